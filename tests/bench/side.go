// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/scripts/image"
	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// podImage is what the pods run. Both sides have it before they start, as an archive.
const podImage = "kedge.test/bench:1"

// A side is one of the two that are compared, in a machine of its own that is ready to start it.
type side interface {
	machine() *testbed.Machine
	// start starts the first process and returns at once.
	start(ctx context.Context) (*testbed.Process, error)
	// stop ends all processes but those of the pods and waits until they are gone.
	stop(ctx context.Context) error
	// config is for an administrator. It fails as long as the side has not made its credentials.
	config(h *host) (*rest.Config, error)
}

func newSide(ctx context.Context, o options, name string, bed *testbed.Bed, opts ...testbed.Option) (side, error) {
	archive, err := podArchive(o)
	if err != nil {
		return nil, err
	}
	files := []string{o.kedge}
	if name == "stock" {
		files = []string{o.stock, o.units}
	}
	if err := warm(files...); err != nil {
		return nil, err
	}
	if name == "stock" {
		return newStock(ctx, o, bed, archive, opts...)
	}
	return newKedge(ctx, o, bed, archive, opts...)
}

// podArchive writes the archive of podImage: a static program of less than a kilobyte that waits.
func podArchive(o options) (string, error) {
	file, err := filepath.Abs(filepath.Join(filepath.Dir(o.units), "pod.tar"))
	if err != nil {
		return "", err
	}
	return file, writeImage(file, podImage, o.pause, "/pause")
}

func writeImage(file, name, rootfs, program string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	c := image.Config{Name: name, Architecture: runtime.GOARCH, Rootfs: rootfs, Entrypoint: []string{program}}
	return errors.Join(image.Write(f, c), f.Close())
}

// warm reads files, so that both sides find their programs in the page cache. On a real machine the larger side would
// read longer.
//
// They are read in such a way that the cache consists of small pages. A program that was written, or read ahead, in pieces of
// 2 MiB would be mapped in such pieces: all of its text would count as memory in use as soon as any of it is, which says more about
// how the file came to this host than about the program.
func warm(paths ...string) error {
	buf := make([]byte, 1<<20)
	for _, p := range paths {
		err := filepath.WalkDir(p, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			return errors.Join(refill(f, buf), f.Close())
		})
		if err != nil {
			return fmt.Errorf("read %s: %w", p, err)
		}
	}
	return nil
}

// refill reads a file anew, without reading ahead.
func refill(f *os.File, buf []byte) error {
	if err := f.Sync(); err != nil { // what is not written yet stays in the cache
		return err
	}
	for _, advice := range []int{unix.FADV_DONTNEED, unix.FADV_RANDOM} {
		if err := unix.Fadvise(int(f.Fd()), 0, 0, advice); err != nil {
			return err
		}
	}
	for {
		_, err := f.Read(buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

type kedge struct{ *cluster.Server }

func newKedge(ctx context.Context, o options, bed *testbed.Bed, archive string, opts ...testbed.Option) (side, error) {
	if err := os.Setenv("KEDGE_BIN", o.kedge); err != nil {
		return nil, err
	}
	s, err := cluster.Prepare(ctx, bed, "kedge", cluster.Options{Machine: opts, Images: []string{archive}, Flags: kedgeFlags(o)})
	return kedge{s}, err
}

// kedgeFlags are those of a server and of an agent that have to do with what is measured.
func kedgeFlags(o options) []string {
	if o.proxy == "" {
		return nil
	}
	return []string{"--proxy-mode", o.proxy}
}

func (k kedge) machine() *testbed.Machine { return k.Machine }

func (k kedge) start(ctx context.Context) (*testbed.Process, error) {
	err := k.Run(ctx)
	return k.Process(), err
}

func (k kedge) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return k.Stop(ctx)
}

func (k kedge) config(h *host) (*rest.Config, error) {
	text, err := os.ReadFile(filepath.Join(h.root(), "etc/kedge/kubeconfig.yaml"))
	if err != nil {
		return nil, err
	}
	c, err := clientcmd.RESTConfigFromKubeConfig(text)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(c.Host)
	if err != nil {
		return nil, err
	}
	u.Host = net.JoinHostPort(k.IP(), u.Port())
	c.Host = strings.TrimSuffix(u.String(), "/")
	return c, nil
}
