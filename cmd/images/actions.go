// SPDX-License-Identifier: Apache-2.0

package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/containerd/log"
	"github.com/urfave/cli/v2"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/images"
	"github.com/kedge-io/kedge/pkg/registries"
)

// progressInterval is how often long work says how far it is.
const progressInterval = 2 * time.Second

// needed is a line of `kedge images list`.
type needed struct {
	images.Need
	// On are the nodes that have it, Lack those that have not. Nodes that did not answer are in neither.
	On   []string `json:"on"`
	Lack []string `json:"lack"`
}

func list(c *cli.Context) error {
	manifests := c.Args().Slice()
	need, err := needs(c, nil, manifests, c.Bool("cluster") || len(manifests) == 0)
	if err != nil {
		return err
	}
	lines := make([]needed, len(need))
	for i := range need {
		lines[i] = needed{need[i], []string{}, []string{}}
	}
	output := c.String("output")
	if output != "name" {
		// Without a cluster the question is what is needed, and nothing more.
		if err := findOnNodes(c, lines); err != nil {
			fmt.Fprintln(c.App.ErrWriter, "kedge:", err)
		}
	}
	switch output {
	case "json":
		enc := json.NewEncoder(c.App.Writer)
		enc.SetIndent("", "  ")
		return enc.Encode(lines)
	case "name":
		for _, l := range lines {
			fmt.Fprintln(c.App.Writer, l.Image)
		}
		return nil
	case "text":
		return writeList(c.App.Writer, lines)
	}
	return fmt.Errorf("unknown output format %q: text, name or json", output)
}

func writeList(out io.Writer, lines []needed) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tNODES\tNEEDED BY")
	for _, l := range lines {
		nodes := "?"
		if asked := len(l.On) + len(l.Lack); asked > 0 {
			nodes = fmt.Sprintf("%d of %d", len(l.On), asked)
		}
		by := l.By[0]
		if more := len(l.By) - 1; more > 0 {
			by += fmt.Sprintf(" and %d more", more)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", l.Image, nodes, by)
	}
	return w.Flush()
}

// findOnNodes asks all nodes of the cluster which images they have.
func findOnNodes(c *cli.Context, lines []needed) error {
	nodes, err := stores(c, true)
	if err != nil {
		return fmt.Errorf("on which nodes they are is not known: %w", err)
	}
	var mu sync.Mutex
	return onAll(nodes, func(n agent.ImageStore) error {
		ctx, cancel := context.WithTimeout(c.Context, 15*time.Second)
		defer cancel()
		have, err := n.List(ctx)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		for i := range lines {
			if len(images.Missing([]string{lines[i].Image}, have)) == 0 {
				lines[i].On = append(lines[i].On, n.Node)
			} else {
				lines[i].Lack = append(lines[i].Lack, n.Node)
			}
		}
		return nil
	})
}

// onAll does something on all nodes, on a few at the same time. Errors are joined, with the node's name.
func onAll(nodes []agent.ImageStore, do func(agent.ImageStore) error) error {
	errs := make([]error, len(nodes))
	slots := make(chan struct{}, 4)
	var all sync.WaitGroup
	for i, n := range nodes {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if err := do(n); err != nil && n.Node != "" {
				errs[i] = fmt.Errorf("node %s: %w", n.Node, err)
			} else {
				errs[i] = err
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

func save(c *cli.Context) (err error) {
	need, err := needs(c, c.Args().Slice(), c.StringSlice("manifests"), c.Bool("cluster"))
	if err != nil {
		return err
	}
	// What containerd's code says on its way (each place that has not got an image) is for a log.
	if err := log.SetLevel("error"); err != nil {
		return err
	}
	registry, err := registries.Load(c.String("private-registry"))
	if err != nil {
		return err
	}
	file, err := filepath.Abs(c.String("output"))
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	saver := images.Saver{Registries: registry, Platform: c.String("platform"), Dir: filepath.Dir(file),
		Say: func(line string) { fmt.Fprintln(c.App.Writer, line) }}
	if socket := agent.ContainerdSocket(c.String("run-dir")); exists(socket) {
		if saver.Node, err = images.Open(socket, "", nil); err != nil {
			return err
		}
		defer saver.Node.Close()
	}
	names := make([]string, len(need))
	for i := range need {
		names[i] = need[i].Image
	}
	if err := saver.Save(c.Context, f, names); err != nil {
		return fmt.Errorf("nothing was written: %w", err)
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close(), os.Rename(f.Name(), file)); err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.App.Writer, "%s: %d images, %s\n", c.String("output"), len(names), megabytes(size))
	return err
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func megabytes(n int64) string {
	return resource.NewQuantity((n+1<<20-1)>>20<<20, resource.BinarySI).String()
}

func importArchives(c *cli.Context) error {
	if c.NArg() == 0 {
		return errors.New("usage: kedge images import [--all-nodes] FILE…")
	}
	nodes, err := stores(c, c.Bool("all-nodes"))
	if err != nil {
		return err
	}
	if slices.Contains(c.Args().Slice(), "-") && len(nodes) > 1 {
		return errors.New("standard input can be read once only: for several nodes give a file")
	}
	out := &lines{out: c.App.Writer}
	return onAll(nodes, func(n agent.ImageStore) error {
		for _, file := range c.Args().Slice() {
			if err := importOne(c, out, n, file); err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
		}
		return nil
	})
}

func importOne(c *cli.Context, out *lines, n agent.ImageStore, file string) error {
	archive := &counted{r: c.App.Reader}
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		archive = &counted{r: f, size: info.Size()}
	}
	where := where(n)
	stop := out.every(progressInterval, func() string { return where + file + ": " + archive.progress() })
	err := n.Import(c.Context, archive, archive.size, func(image string) { out.say(where + image) })
	stop()
	return err
}

func where(n agent.ImageStore) string {
	if n.Node == "" {
		return ""
	}
	return n.Node + ": "
}

func pull(c *cli.Context) error {
	need, err := needs(c, c.Args().Slice(), c.StringSlice("manifests"), c.Bool("cluster"))
	if err != nil {
		return err
	}
	nodes, err := stores(c, c.Bool("all-nodes"))
	if err != nil {
		return err
	}
	out := &lines{out: c.App.Writer}
	return onAll(nodes, func(n agent.ImageStore) error {
		var errs []error
		for i, image := range need {
			start := time.Now()
			stop := out.every(5*progressInterval, func() string {
				return fmt.Sprintf("%s%d/%d %s: pulling for %s", where(n), i+1, len(need), image.Image, time.Since(start).Round(time.Second))
			})
			errs = append(errs, n.Pull(c.Context, []string{image.Image}, func(image string) { out.say(where(n) + image) }))
			stop()
		}
		return errors.Join(errs...)
	})
}

// counted counts what is read.
type counted struct {
	r    io.Reader
	size int64 // 0 if it is not known
	n    atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func (c *counted) progress() string {
	n := c.n.Load()
	switch {
	case c.size == 0:
		return megabytes(n)
	case n >= c.size:
		return "sent, being unpacked"
	}
	return fmt.Sprintf("%s of %s (%d %%)", megabytes(n), megabytes(c.size), n*100/c.size)
}

// lines writes the lines of several nodes.
type lines struct {
	mu  sync.Mutex
	out io.Writer
}

func (l *lines) say(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintln(l.out, strings.TrimSpace(line))
}

// every says something in intervals until the returned function is called.
func (l *lines) every(interval time.Duration, text func() string) (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for {
			select {
			case <-end:
				return
			case <-ticker.C:
				l.say(text())
			}
		}
	}()
	return func() { close(end); <-ended }
}
