// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed" // the configuration files below
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"k8s.io/client-go/rest"

	"github.com/kedge-io/kedge/tests/testbed"
)

// Where the stock side has its files, in its machine.
const (
	stockDir   = "/opt/stock"
	unitsBin   = "/opt/units"
	imagesDir  = "/opt/images"
	etcDir     = "/etc/kubernetes"
	pauseImage = "kedge.io/pause:1.0"
	apiPort    = "6443"
)

// stock is the way in which kubeadm arranges the components: each its own process with its own credentials, flags at their
// defaults where kubeadm leaves them there. Where there was a choice, the one that is better for stock was taken:
//   - no DNS, no kubectl, no crictl, no kube-proxy and flannel in pods
//   - etcd without TLS; certificates are made before the start, and not counted
//   - nothing waits in a back-off: what has to wait for the API or for flannel starts the moment that it is there
//   - no systemd: the program in directory units starts everything, and is not counted
type stock struct {
	m    *testbed.Machine
	pki  *stockPKI
	proc *testbed.Process
}

func newStock(ctx context.Context, o options, bed *testbed.Bed, archive string, opts ...testbed.Option) (*stock, error) {
	m, err := stockMachine(ctx, o, bed, "stock", o.stock, append(opts, testbed.Bind(archive, imagesDir+"/pod.tar")))
	if err != nil {
		return nil, err
	}
	pki, err := newStockPKI(m.Name(), m.IP())
	if err != nil {
		return nil, fmt.Errorf("certificates of the stock side: %w", err)
	}
	units := append(controlUnits(m.Name(), m.IP()), nodeUnits(m.Name(), m.IP(), "https://127.0.0.1:"+apiPort)...)
	return &stock{m: m, pki: pki}, setUpStock(ctx, m, o.proxy, pki.files, units)
}

// newNode makes another machine, with the node parts only. Its programs are in dir.
func (s *stock) newNode(ctx context.Context, o options, bed *testbed.Bed, dir string, opts ...testbed.Option) (*stock, error) {
	m, err := stockMachine(ctx, o, bed, "stocknode", dir, opts)
	if err != nil {
		return nil, err
	}
	api := "https://" + net.JoinHostPort(s.m.IP(), apiPort)
	credentials, err := s.pki.node(m.Name(), api)
	if err != nil {
		return nil, fmt.Errorf("certificates of a stock node: %w", err)
	}
	return &stock{m: m, pki: s.pki}, setUpStock(ctx, m, o.proxy, credentials, nodeUnits(m.Name(), m.IP(), api))
}

// stockMachine makes a machine with the programs of a directory.
func stockMachine(ctx context.Context, o options, bed *testbed.Bed, name, dir string, opts []testbed.Option) (*testbed.Machine, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	units, err := filepath.Abs(o.units)
	if err != nil {
		return nil, err
	}
	pause := filepath.Join(filepath.Dir(units), "pause.tar")
	if err := writeImage(pause, pauseImage, o.pause, "/pause"); err != nil {
		return nil, err
	}
	return bed.Machine(ctx, name, append(opts, testbed.Bind(dir, stockDir), testbed.Bind(units, unitsBin),
		testbed.Bind(pause, imagesDir+"/pause.tar"))...)
}

//go:embed stock.tmpl
var stockTemplates string

// setUpStock writes the configuration: the templates, the credentials (by name below /etc/kubernetes) and the units.
func setUpStock(ctx context.Context, m *testbed.Machine, proxy string, credentials map[string][]byte, units []unit) error {
	files, err := stockConfig(cmp.Or(proxy, "nftables"))
	if err != nil {
		return err
	}
	for name, text := range credentials {
		files[path.Join(etcDir, name)] = text
	}
	if files["/etc/units.json"], err = json.Marshal(units); err != nil {
		return err
	}
	for name, text := range files {
		if err := m.WriteFile(name, text, 0o600); err != nil {
			return err
		}
	}
	_, err = m.Exec(ctx, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	return err
}

// stockConfig are the components' configuration files, which are the same on every machine.
func stockConfig(proxy string) (map[string][]byte, error) {
	files := map[string][]byte{}
	t, err := template.New("").Option("missingkey=error").Parse(stockTemplates)
	if err != nil {
		return nil, err
	}
	data := map[string]string{"Bin": stockDir, "Etc": etcDir, "Pause": pauseImage, "Proxy": proxy}
	for _, sub := range t.Templates() {
		if !path.IsAbs(sub.Name()) {
			continue
		}
		var b bytes.Buffer
		if err := sub.Execute(&b, data); err != nil {
			return nil, err
		}
		files[sub.Name()] = b.Bytes()
	}
	return files, nil
}

type unit struct {
	Name  string
	Args  []string
	Env   []string
	After string
	Once  bool
}

func etcFile(file string) string { return path.Join(etcDir, file) }

func stockProgram(name string) string { return path.Join(stockDir, name) }

// controlUnits are the control plane of a server.
func controlUnits(name, ip string) []unit {
	k, b := etcFile, stockProgram
	return []unit{
		{Name: "etcd", Args: []string{b("etcd"), "--name", name, "--data-dir", "/var/lib/etcd",
			"--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
			"--listen-peer-urls", "http://127.0.0.1:2380", "--initial-advertise-peer-urls", "http://127.0.0.1:2380",
			"--initial-cluster", name + "=http://127.0.0.1:2380"}},
		{Name: "kube-apiserver", Args: []string{b("kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379",
			"--advertise-address=" + ip, "--secure-port=" + apiPort, "--service-cluster-ip-range=10.43.0.0/16", "--allow-privileged",
			"--tls-cert-file=" + k("apiserver.crt"), "--tls-private-key-file=" + k("apiserver.key"), "--client-ca-file=" + k("ca.crt"),
			"--kubelet-client-certificate=" + k("kubelet-client.crt"), "--kubelet-client-key=" + k("kubelet-client.key"),
			"--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname",
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file=" + k("sa.pub"), "--service-account-signing-key-file=" + k("sa.key"),
			"--requestheader-client-ca-file=" + k("front-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
			"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
			"--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--proxy-client-cert-file=" + k("front-proxy-client.crt"), "--proxy-client-key-file=" + k("front-proxy-client.key"),
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--enable-bootstrap-token-auth"}},
		{Name: "kube-controller-manager", Args: []string{b("kube-controller-manager"), "--kubeconfig=" + k("controller-manager.conf"),
			"--authentication-kubeconfig=" + k("controller-manager.conf"), "--authorization-kubeconfig=" + k("controller-manager.conf"),
			"--allocate-node-cidrs", "--cluster-cidr=10.42.0.0/16", "--service-cluster-ip-range=10.43.0.0/16", "--bind-address=127.0.0.1",
			"--root-ca-file=" + k("ca.crt"), "--service-account-private-key-file=" + k("sa.key"), "--use-service-account-credentials",
			"--cluster-signing-cert-file=" + k("ca.crt"), "--cluster-signing-key-file=" + k("ca.key"), "--controllers=*,bootstrapsigner,tokencleaner"}},
		{Name: "kube-scheduler", Args: []string{b("kube-scheduler"), "--kubeconfig=" + k("scheduler.conf"), "--bind-address=127.0.0.1",
			"--authentication-kubeconfig=" + k("scheduler.conf"), "--authorization-kubeconfig=" + k("scheduler.conf")}},
	}
}

// nodeUnits are the parts of a node that uses the API server at a URL.
func nodeUnits(name, ip, api string) []unit {
	// runc, the shim and the network tools are found by PATH.
	tools := "PATH=" + stockDir + ":" + stockDir + "/tools:/usr/sbin:/usr/bin:/sbin:/bin"
	ready := api + "/readyz"
	const socket, subnet = "/run/containerd/containerd.sock", "/run/flannel/subnet.env"
	k, b := etcFile, stockProgram
	return []unit{
		{Name: "containerd", Args: []string{b("containerd")}, Env: []string{tools}},
		{Name: "images", Once: true, After: socket, Args: []string{"sh", "-c",
			// Once on a fresh disk, as a user would have pulled them.
			"[ -f /var/lib/images-are-there ] || { for i in " + imagesDir + "/*.tar; do " + b("ctr") + " -n k8s.io images import --local $i || exit; done; touch /var/lib/images-are-there; }"}},
		{Name: "kubelet", After: socket, Env: []string{tools}, Args: []string{b("kubelet"), "--config=" + k("kubelet.yaml"),
			"--kubeconfig=" + k("kubelet.conf"), "--hostname-override=" + name, "--node-ip=" + ip}},
		{Name: "flanneld", After: ready, Env: []string{tools, "NODE_NAME=" + name}, Args: []string{b("flanneld"),
			"-kubeconfig", k("flannel.conf"), "-net-conf", "/etc/kube-flannel/net-conf.json", "-iface", "eth0", "-subnet-file", subnet}},
		// What flannel's CNI plugin delegates to. It is written when flannel is ready: the node would be Ready before its
		// network otherwise, and the first pod would fail and wait for its back-off.
		{Name: "cni", Once: true, After: subnet, Args: []string{"sh", "-ec", "[ ! -f /etc/cni/net.d/10-flannel.conflist ] || exit 0; . " + subnet +
			"; mkdir -p /etc/cni/net.d; sed \"s#SUBNET#${FLANNEL_SUBNET%.*}.0/${FLANNEL_SUBNET#*/}#; s#MTU#$FLANNEL_MTU#\" /etc/cni/template >/etc/cni/net.d/.new; mv /etc/cni/net.d/.new /etc/cni/net.d/10-flannel.conflist"}},
		{Name: "kube-proxy", After: ready, Env: []string{tools}, Args: []string{b("kube-proxy"), "--config=" + k("proxy.yaml"), "--hostname-override=" + name}},
	}
}

func (s *stock) machine() *testbed.Machine { return s.m }

func (s *stock) start(ctx context.Context) (p *testbed.Process, err error) {
	s.proc, err = s.m.Spawn(ctx, "/var/log/units.log", unitsBin, "/etc/units.json")
	return s.proc, err
}

func (s *stock) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := s.proc.Signal(ctx, "TERM"); err != nil {
		return err
	}
	return s.proc.Wait(ctx)
}

func (s *stock) config(*host) (*rest.Config, error) { return s.pki.admin, nil }

// stockFiles are the programs that the stock side runs: not ctr, which only imports the images, and not the network tools.
func stockFiles(dir string) ([]string, error) {
	var files []string
	for _, pattern := range []string{"etcd", "kube-*", "kubelet", "containerd*", "runc", "flanneld", "cni/*"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return nil, err
		}
		files = append(files, found...)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s: %w: run make bench-stock", strings.TrimSuffix(dir, "/"), os.ErrNotExist)
	}
	return files, nil
}
