// SPDX-License-Identifier: Apache-2.0

// Package images is the command `kedge images`.
package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/urfave/cli/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/images"
)

var (
	manifestsFlag  = &cli.StringSliceFlag{Name: "manifests", Aliases: []string{"m"}, Usage: "the images that the objects in `FILE` name (YAML or JSON; a directory; - is standard input)"}
	clusterFlag    = &cli.BoolFlag{Name: "cluster", Usage: "the images that the cluster's workloads name"}
	allNodesFlag   = &cli.BoolFlag{Name: "all-nodes", Aliases: []string{"A"}, Usage: "on all nodes of the cluster"}
	nodeFlag       = &cli.StringSliceFlag{Name: "node", Usage: "on the node `NAME` of the cluster"}
	kubeconfigFlag = &cli.StringFlag{Name: "kubeconfig", Value: config.DefaultKubeconfig, Usage: "for the cluster and other nodes: an administrator's kubeconfig, `FILE`"}
	runDirFlag     = &cli.StringFlag{Name: "run-dir", Usage: "`DIR` of Kedge's sockets", Value: agent.DefaultRunDir, Hidden: true}
)

// Command is `kedge images`.
func Command() *cli.Command {
	return &cli.Command{
		Name:  "images",
		Usage: "bring container images to nodes that reach no registry",
		Description: "On a machine with a network:   kedge images save --manifests app/ -o app.tar.zst\n" +
			"On a server without:           kedge images import --all-nodes app.tar.zst\n" +
			"Kedge itself needs no image. What is imported is pinned: no garbage collection removes it.",
		Subcommands: []*cli.Command{
			{
				Name: "list", Usage: "list images that are needed, by what, and on how many nodes they are", ArgsUsage: "[MANIFEST…]",
				Description: "Without arguments: what the cluster's workloads need. With files: what the objects in them need.",
				Flags: []cli.Flag{clusterFlag, kubeconfigFlag, runDirFlag,
					&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT`: text, name (for scripts) or json", Value: "text"}},
				Action: list,
			},
			{
				Name: "save", Usage: "pack images into one archive", ArgsUsage: "[IMAGE…]",
				Description: "Takes images from this machine's node if there is one that has them, else from their registries. Needs no cluster.",
				Flags: []cli.Flag{manifestsFlag, clusterFlag, kubeconfigFlag, runDirFlag,
					&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "write to `FILE`, compressed with zstd", Required: true},
					&cli.StringFlag{Name: "platform", Usage: "for machines of `OS/ARCHITECTURE`", Value: "linux/" + runtime.GOARCH},
					&cli.StringFlag{Name: "private-registry", Usage: "read mirrors and credentials of registries from `FILE`, if it exists", Value: config.DefaultRegistries},
				},
				Action: save,
			},
			{
				Name: "import", Usage: "bring the images in archives to this node, or others", ArgsUsage: "FILE…",
				Description: "Takes what `kedge images save`, `docker save`, `podman save` and `ctr images export` write, compressed or not; - is standard input.\n" +
					"An archive in " + filepath.Join(config.DefaultDataDir, "images") + " is imported at the next start without this command.",
				Flags:  []cli.Flag{allNodesFlag, nodeFlag, kubeconfigFlag, runDirFlag},
				Action: importArchives,
			},
			{
				Name: "pull", Usage: "have this node, or others, pull images now", ArgsUsage: "[IMAGE…]",
				Flags:  []cli.Flag{manifestsFlag, clusterFlag, allNodesFlag, nodeFlag, kubeconfigFlag, runDirFlag},
				Action: pull,
			},
		},
	}
}

// needs collects the images that are given by name, in manifests and by --cluster.
func needs(c *cli.Context, names, manifests []string, cluster bool) ([]images.Need, error) {
	var n images.Needs
	for _, name := range names {
		if err := n.Add(name, "the command line"); err != nil {
			return nil, err
		}
	}
	for _, path := range manifests {
		if err := readManifests(&n, c, path); err != nil {
			return nil, err
		}
	}
	if cluster {
		client, err := client(c)
		if err != nil {
			return nil, err
		}
		if err := n.ReadCluster(c.Context, client); err != nil {
			return nil, err
		}
	}
	list := n.List()
	switch {
	case len(list) > 0:
		return list, nil
	case cluster || len(manifests) > 0:
		return nil, errors.New("no image: nothing in the manifests, or in the cluster, needs one")
	}
	return nil, errors.New("no image: name some, or give --manifests FILE or --cluster")
}

func readManifests(n *images.Needs, c *cli.Context, path string) error {
	if path == "-" {
		return n.Read(c.App.Reader)
	}
	return filepath.WalkDir(path, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		switch filepath.Ext(path) {
		case ".yaml", ".yml", ".json":
		default:
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := n.Read(f); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return nil
	})
}

func client(c *cli.Context) (kubernetes.Interface, error) {
	kubeconfig := c.String("kubeconfig")
	if _, err := os.Stat(kubeconfig); err != nil {
		return nil, fmt.Errorf("an administrator's kubeconfig is needed: run this on a server, or give --kubeconfig: %w", err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

// stores gives the nodes that are meant: this machine's, unless others are named.
func stores(c *cli.Context, all bool) ([]agent.ImageStore, error) {
	names := c.StringSlice("node")
	if all {
		client, err := client(c)
		if err != nil {
			return nil, err
		}
		nodes, err := client.CoreV1().Nodes().List(c.Context, metav1.ListOptions{})
		if err != nil {
			return nil, err
		}
		for _, n := range nodes.Items {
			names = append(names, n.Name)
		}
	}
	if len(names) == 0 {
		return []agent.ImageStore{{RunDir: c.String("run-dir")}}, nil
	}
	var stores []agent.ImageStore
	for _, name := range names {
		stores = append(stores, agent.ImageStore{Node: name, Kubeconfig: c.String("kubeconfig")})
	}
	return stores, nil
}
