// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kedge-io/kedge/pkg/registries"
)

// Saver packs images into an archive that every node can import.
type Saver struct {
	// Node is the store of the node on this machine, whose images are taken from it. Without one (a zero Store), and for images that
	// it has not, registries are asked.
	Node Store
	// Registries has mirrors, CAs and credentials.
	Registries *registries.Config
	// Platform is what the images are for, as linux/arm64.
	Platform string
	// Dir is where a directory is made for what is pulled meanwhile. It is removed at the end.
	Dir string
	// Say gets a line when work on an image begins.
	Say func(string)
}

// Save writes an OCI image layout, which is a `docker save` archive, too, compressed with zstd. The names must be full ones, see Name.
func (s Saver) Save(ctx context.Context, w io.Writer, names []string) error {
	platform, err := platforms.Parse(s.Platform)
	if err != nil {
		return fmt.Errorf("platform %q: %w", s.Platform, err)
	}
	dir, err := os.MkdirTemp(s.Dir, ".kedge-images-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	store, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		return err
	}
	sources := providers{store}
	if s.Node.Client != nil {
		sources = append(sources, s.Node.Client.ContentStore())
	}
	hosts := filepath.Join(dir, "hosts")
	if _, err := s.Registries.Write(hosts); err != nil {
		return err
	}
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: config.ConfigureHosts(ctx, config.HostOptions{
		HostDir:     config.HostDirFromRoot(hosts),
		Credentials: s.Registries.Credentials,
	})})

	match := platforms.Only(platform)
	options := []archive.ExportOpt{archive.WithPlatform(match)}
	var errs []error
	for i, name := range names {
		what := fmt.Sprintf("%d/%d %s", i+1, len(names), name)
		target, found, err := s.onNode(ctx, name, match)
		switch {
		case err != nil:
		case found:
			s.Say(what + ": on this node")
		default:
			s.Say(what + ": pulling")
			target, err = pull(ctx, resolver, store, name, match)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		options = append(options, archive.WithManifest(target, name))
	}
	// Half a bundle would be found out far from any registry.
	if err := errors.Join(errs...); err != nil {
		return err
	}
	z, err := compression.CompressStream(w, compression.Zstd)
	if err != nil {
		return err
	}
	if err := archive.Export(ctx, sources, z, options...); err != nil {
		return errors.Join(err, z.Close())
	}
	return z.Close()
}

// onNode finds an image that is complete on this machine's node.
func (s Saver) onNode(ctx context.Context, name string, match platforms.MatchComparer) (target ocispec.Descriptor, found bool, err error) {
	if s.Node.Client == nil {
		return target, false, nil
	}
	image, err := s.Node.Client.ImageService().Get(ctx, name)
	if errdefs.IsNotFound(err) {
		return target, false, nil
	} else if err != nil {
		return target, false, err
	}
	// What the node lacks, or has for another platform, the registry may have.
	store := s.Node.Client.ContentStore()
	found, _, _, _, err = images.Check(ctx, store, image.Target, match)
	return image.Target, found && isFor(ctx, store, image.Target, match) == nil, err
}

// pull fetches an image for one platform into store.
func pull(ctx context.Context, resolver remotes.Resolver, store content.Store, name string, match platforms.MatchComparer) (ocispec.Descriptor, error) {
	name, target, err := resolver.Resolve(ctx, name)
	if err != nil {
		return target, err
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return target, err
	}
	children := images.LimitManifests(images.FilterPlatforms(images.ChildrenHandler(store), match), match, 1)
	if err := images.Dispatch(ctx, images.Handlers(remotes.FetchHandler(store, fetcher), children), nil, target); err != nil {
		return target, err
	}
	return target, isFor(ctx, store, target, match)
}

// isFor is an error if an image is not for a platform: a registry may have its name for others only.
func isFor(ctx context.Context, store content.Provider, image ocispec.Descriptor, match platforms.MatchComparer) error {
	have, err := images.Platforms(ctx, store, image)
	if err != nil || slices.ContainsFunc(have, match.Match) {
		return err
	}
	var names []string
	for _, p := range have {
		names = append(names, platforms.Format(p))
	}
	return fmt.Errorf("it is not for that platform, but for %s", strings.Join(names, ", "))
}

// providers look for content in one store after the other.
type providers []content.InfoReaderProvider

var _ content.InfoReaderProvider = providers{}

// Info is that of the first store that has the content.
func (p providers) Info(ctx context.Context, d digest.Digest) (info content.Info, err error) {
	for _, provider := range p {
		if info, err = provider.Info(ctx, d); !errdefs.IsNotFound(err) {
			return info, err
		}
	}
	return info, err
}

// ReaderAt reads from the first store that has the content.
func (p providers) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (r content.ReaderAt, err error) {
	for _, provider := range p {
		if r, err = provider.ReaderAt(ctx, desc); !errdefs.IsNotFound(err) {
			return r, err
		}
	}
	return r, err
}
