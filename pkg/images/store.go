// SPDX-License-Identifier: Apache-2.0

// Package images brings container images to nodes without a registry: it finds out which ones a cluster or its manifests need, packs
// them into one archive, and imports archives into the containerd of a node.
package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// pinned keeps an image out of the kubelet's garbage collection: an air-gapped node could not get it back.
const pinnedLabel, pinnedValue = "io.cri-containerd.pinned", "pinned"

// Store is the images of a node: those in the namespace k8s.io of its containerd.
type Store struct {
	Client      *containerd.Client
	Snapshotter string
	Log         *slog.Logger
}

// Open connects to the containerd that listens on socket. It must be running.
func Open(socket, snapshotter string, log *slog.Logger) (Store, error) {
	client, err := containerd.New(socket, containerd.WithDefaultNamespace("k8s.io"), containerd.WithTimeout(5*time.Second))
	if err != nil {
		return Store{}, fmt.Errorf("containerd does not answer on %s: %w", socket, err)
	}
	return Store{client, snapshotter, log}, nil
}

// Close ends the connection.
func (im Store) Close() error { return im.Client.Close() }

// Ensure imports archive unless the image name is there already and complete.
func (im Store) Ensure(ctx context.Context, name, archive string) error {
	img, err := im.Client.GetImage(ctx, name)
	if err == nil {
		if unpacked, err := img.IsUnpacked(ctx, im.Snapshotter); err == nil && unpacked {
			return nil
		}
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	_, err = im.importFile(ctx, archive)
	return err
}

func (im Store) importFile(ctx context.Context, file string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := im.Import(ctx, f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return names, nil
}

// Import imports and unpacks an archive (OCI layout or docker save, plain or compressed) and returns the names of the images in it.
// They are pinned: the kubelet's garbage collection leaves them alone.
func (im Store) Import(ctx context.Context, archive io.Reader) ([]string, error) {
	stream, err := compression.DecompressStream(archive)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	list, err := im.Client.Import(ctx, stream, containerd.WithImageLabels(map[string]string{
		pinnedLabel: pinnedValue, "io.cri-containerd.image": "managed",
	}), containerd.WithSkipMissing())
	if err != nil {
		return nil, fmt.Errorf("not an image archive that can be imported (OCI layout or docker save): %w", err)
	}
	var names []string
	for _, i := range list {
		if i, err = im.fullName(ctx, i); err != nil {
			return nil, err
		}
		names = append(names, i.Name)
		if err := containerd.NewImage(im.Client, i).Unpack(ctx, im.Snapshotter); err != nil {
			return nil, fmt.Errorf("unpack %s: %w", i.Name, err)
		}
	}
	return names, nil
}

// fullName renames an image whose name is as people write it: the kubelet looks for shop/web:1 under docker.io/shop/web:1 only.
func (im Store) fullName(ctx context.Context, image images.Image) (images.Image, error) {
	full, err := Name(image.Name)
	if err != nil || full == image.Name { // what is no name of an image is left as it is
		return image, nil
	}
	short := image.Name
	image.Name = full
	store := im.Client.ImageService()
	renamed, err := store.Create(ctx, image)
	if errdefs.IsAlreadyExists(err) {
		renamed, err = store.Update(ctx, image)
	}
	if err != nil {
		return image, fmt.Errorf("name %s: %w", full, err)
	}
	return renamed, store.Delete(ctx, short)
}

// imported remembers an archive: it is not imported again while its digest stays the same and its images exist.
type imported struct {
	Size    int64         `json:"size"`
	ModTime time.Time     `json:"modTime"`
	Digest  digest.Digest `json:"digest"`
	Images  []string      `json:"images"`
}

// ImportDir imports every archive of dir that record does not know, and reports what it is busy with. All archives are tried;
// the error joins what went wrong.
func (im Store) ImportDir(ctx context.Context, dir, record string, progress func(string)) error {
	known := map[string]imported{}
	if b, err := os.ReadFile(record); err == nil {
		if err := json.Unmarshal(b, &known); err != nil {
			im.Log.Warn("unreadable record of imported images, importing all again", "file", record, "error", err)
			known = map[string]imported{}
		}
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	var errs []error
	now, changed := map[string]imported{}, false
	for _, e := range entries {
		if !e.Type().IsRegular() && e.Type()&os.ModeSymlink == 0 || !isArchive(e.Name()) {
			continue
		}
		have, fresh, err := im.importOnce(ctx, filepath.Join(dir, e.Name()), known[e.Name()], progress)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		now[e.Name()], changed = have, changed || fresh
	}
	if changed || len(now) != len(known) {
		b, err := json.MarshalIndent(now, "", " ")
		if err == nil {
			err = os.WriteFile(record, b, 0o600)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func isArchive(name string) bool {
	for _, ext := range []string{".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd"} {
		if strings.HasSuffix(name, ext) {
			return true
		}
	}
	return false
}

// importOnce imports file unless known says that it has been; fresh is true when it had to look at the content.
func (im Store) importOnce(ctx context.Context, file string, known imported, progress func(string)) (now imported, fresh bool, err error) {
	info, err := os.Stat(file)
	if err != nil {
		return known, false, err
	}
	complete := im.complete(ctx, known.Images)
	if complete && info.Size() == known.Size && info.ModTime().Equal(known.ModTime) {
		return known, false, nil
	}
	progress(fmt.Sprintf("importing %s (%d MiB)", file, info.Size()>>20))
	sum, err := fileDigest(file)
	if err != nil {
		return known, false, err
	}
	now = imported{Size: info.Size(), ModTime: info.ModTime(), Digest: sum, Images: known.Images}
	if complete && sum == known.Digest {
		return now, true, nil
	}
	start := time.Now()
	if now.Images, err = im.importFile(ctx, file); err != nil {
		return known, false, err
	}
	im.Log.Info("imported image archive", "file", file, "images", now.Images, "took", time.Since(start).Round(time.Millisecond))
	return now, true, nil
}

// complete says whether all named images are still there.
func (im Store) complete(ctx context.Context, names []string) bool {
	for _, name := range names {
		if _, err := im.Client.ImageService().Get(ctx, name); err != nil {
			return false
		}
	}
	return len(names) > 0
}

func fileDigest(file string) (digest.Digest, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := digest.Canonical.Digester()
	if _, err := io.Copy(sum.Hash(), f); err != nil {
		return "", fmt.Errorf("read %s: %w", file, err)
	}
	return sum.Digest(), nil
}
