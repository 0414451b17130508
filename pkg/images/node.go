// SPDX-License-Identifier: Apache-2.0

package images

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	internalapi "k8s.io/cri-api/pkg/apis"
	criapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	cri "k8s.io/cri-client/pkg"
)

// Image is an image on a node.
type Image struct {
	// Names are its tags and digests, as docker.io/library/busybox:1.36.
	Names []string `json:"names"`
	// Size in bytes, compressed layers as they are kept and what they are unpacked to.
	Size uint64 `json:"size"`
	// Pinned images are left alone by the kubelet's garbage collection.
	Pinned bool `json:"pinned"`
}

func service(ctx context.Context, socket string) (internalapi.ImageManagerService, error) {
	images, err := cri.NewRemoteImageServiceBuilder().WithEndpoint("unix://" + socket).WithConnectionTimeout(10 * time.Second).
		WithTracerProvider(noop.NewTracerProvider()).Build(ctx)
	if err != nil {
		return nil, fmt.Errorf("containerd: %w", err)
	}
	return images, nil
}

// OnNode lists the images in the containerd that listens on socket.
func OnNode(ctx context.Context, socket string) ([]Image, error) {
	s, err := service(ctx, socket)
	if err != nil {
		return nil, err
	}
	list, err := s.ListImages(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("containerd: %w", err)
	}
	images := make([]Image, 0, len(list))
	for _, i := range list {
		images = append(images, Image{append(slices.Clone(i.RepoTags), i.RepoDigests...), i.Size, i.Pinned})
	}
	slices.SortFunc(images, func(a, b Image) int { return slices.Compare(a.Names, b.Names) })
	return images, nil
}

// Pull has the containerd that listens on socket pull an image, by the mirrors and credentials of its registries.yaml.
func Pull(ctx context.Context, socket, name string) error {
	s, err := service(ctx, socket)
	if err != nil {
		return err
	}
	_, err = s.PullImage(ctx, &criapi.ImageSpec{Image: name}, nil, nil)
	return err
}

// Missing are the names that are not among the images of a node.
func Missing(names []string, on []Image) []string {
	var all []string
	for _, i := range on {
		all = append(all, i.Names...)
	}
	slices.SortFunc(all, cmp.Compare[string])
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		_, found := slices.BinarySearch(all, name)
		return found
	})
}
