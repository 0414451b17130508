// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	cliflag "k8s.io/component-base/cli/flag"
	kubeletapp "k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/apis/config/validation"

	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/pki"
)

type kubelet struct{ server *options.KubeletServer }

// CheckArgs refuses flags that kubelet and kube-proxy do not have or do not accept, before anything is started.
func CheckArgs(cfg Config) error {
	if _, err := newKubelet(cfg); err != nil {
		return err
	}
	return checkProxyArgs(cfg)
}

// newKubelet builds the kubelet's configuration: Kedge's values over upstream's defaults, the operator's flags over both.
func newKubelet(cfg Config) (*kubelet, error) {
	kc, err := options.NewKubeletConfiguration()
	if err != nil {
		return nil, fmt.Errorf("kubelet: %w", err)
	}
	fl := options.NewKubeletFlags()
	setKubelet(cfg, kc, fl)

	fs := pflag.NewFlagSet("kubelet-arg", pflag.ContinueOnError)
	fs.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	fl.AddFlags(fs)
	options.AddKubeletConfigFlags(fs, kc)
	options.AddGlobalFlags(fs)
	line := dashed(cfg.KubeletArgs)
	for _, l := range cfg.Labels {
		line = append(line, "--node-labels="+l)
	}
	for _, t := range cfg.Taints {
		line = append(line, "--register-with-taints="+t)
	}
	if err := fs.Parse(line); err != nil {
		return nil, fmt.Errorf("kubelet-arg: %w", err)
	}
	// One set of gates for the process: kube-proxy's are the kubelet's.
	if kc.FeatureGates == nil {
		kc.FeatureGates = map[string]bool{}
	}
	if err := utilfeature.DefaultMutableFeatureGate.SetFromMap(kc.FeatureGates); err != nil {
		return nil, fmt.Errorf("kubelet-arg feature-gates: %w", err)
	}
	if err := validation.ValidateKubeletConfiguration(kc, utilfeature.DefaultFeatureGate); err != nil {
		return nil, fmt.Errorf("kubelet-arg: %w", err)
	}
	if err := options.ValidateKubeletFlags(fl); err != nil {
		return nil, fmt.Errorf("kubelet-arg: %w", err)
	}
	return &kubelet{&options.KubeletServer{KubeletFlags: *fl, KubeletConfiguration: *kc}}, nil
}

// dashed gives arguments the dashes that a flag set wants.
func dashed(args []string) []string {
	line := make([]string, len(args))
	for i, a := range args {
		line[i] = "--" + strings.TrimLeft(a, "-")
	}
	return line
}

func setKubelet(cfg Config, kc *kubeletconfig.KubeletConfiguration, fl *options.KubeletFlags) {
	addresses := make([]string, len(cfg.Address))
	for i, a := range cfg.Address {
		addresses[i] = a.String()
	}
	fl.KubeConfig = cfg.Kubeconfig
	fl.HostnameOverride = cfg.Name
	fl.NodeIP = strings.Join(addresses, ",")
	if len(cfg.ExternalAddress) > 0 {
		fl.CloudProvider = "external" // it leaves addresses alone that others write: see AnnotationExternalIP
	}
	fl.RootDirectory = cfg.RootDir
	fl.CertDirectory = CertDir(cfg.RootDir)

	kc.ContainerRuntimeEndpoint = "unix://" + cfg.ContainerdSocket
	kc.Authentication.Anonymous.Enabled = false
	kc.Authentication.Webhook.Enabled = true
	kc.Authentication.X509.ClientCAFile = cfg.ClientCA
	kc.Authorization.Mode = kubeletconfig.KubeletAuthorizationModeWebhook
	kc.TLSCertFile, kc.TLSPrivateKeyFile = cfg.ServingCert, cfg.ServingCert
	if cfg.ServingCert == "" {
		// A node without the keys of the CAs: both certificates come from the cluster and are rotated by the kubelet.
		kc.ServerTLSBootstrap, kc.RotateCertificates = true, true
	}
	kc.ReadOnlyPort = 0
	kc.TLSCipherSuites = pki.StrongCiphers()
	kc.ProtectKernelDefaults = cfg.ProtectKernelDefaults
	// Pods that do not say otherwise get the runtime's filter of system calls, and no pod takes all process IDs of the machine.
	kc.SeccompDefault = true
	kc.PodPidsLimit = podPIDs
	kc.ClusterDomain = cfg.ClusterDomain
	if cfg.DNS {
		kc.ClusterDNS = []string{cfg.ClusterDNS.String()}
	}
	kc.ResolverConfig = cfg.kubeletResolvConf()
	kc.VolumePluginDir = filepath.Join(cfg.RootDir, "volumeplugins")
	// Swap is the machine's business: pods do not get it (memorySwap.swapBehavior NoSwap is the default).
	kc.FailSwapOn = false
	// Kubernetes deprecates cgroup v1; boards and NAS boxes that boot with it still have to work.
	kc.FailCgroupV1 = false
	if canLowerOOMScore() {
		kc.OOMScoreAdj = -999
	} else {
		kc.OOMScoreAdj = 0
	}
	if limit := maxOpenFiles(); limit > 0 && kc.MaxOpenFiles > limit {
		kc.MaxOpenFiles = limit
	}
	// Kedge ends the pods itself when the machine goes down, see pkg/agent/shutdown.go: the kubelet's way takes logind, and leaves pods as
	// Failed that should run again after a reboot.
	kc.ShutdownGracePeriod, kc.ShutdownGracePeriodCriticalPods = metav1.Duration{}, metav1.Duration{}
	// How long a node stays tainted after pressure is gone. Upstream's five minutes suit a cluster that has other nodes.
	kc.EvictionPressureTransitionPeriod = metav1.Duration{Duration: time.Minute}
	setDiskThresholds(kc, diskSize(cfg.RootDir))
}

// podPIDs is how many processes and threads a pod may have unless kubelet-arg pod-max-pids says otherwise.
const podPIDs = 4096

// Settings are what the kubelet and kube-proxy of a node with this configuration run with.
type Settings struct {
	Kubelet *kubeletconfig.KubeletConfiguration
	Flags   *options.KubeletFlags
	// ProxyMetrics is where kube-proxy serves its metrics; empty without a kube-proxy.
	ProxyMetrics string
}

// EffectiveSettings starts nothing.
func EffectiveSettings(cfg Config) (*Settings, error) {
	k, err := newKubelet(cfg)
	if err != nil {
		return nil, err
	}
	s := &Settings{Kubelet: &k.server.KubeletConfiguration, Flags: &k.server.KubeletFlags}
	if cfg.ProxyMode == "" {
		return s, nil
	}
	_, fs, err := proxyOptions(cfg, config.ProxyNFTables)
	if err != nil {
		return nil, err
	}
	s.ProxyMetrics = fs.Lookup("metrics-bind-address").Value.String()
	return s, nil
}

// CertDir is where the kubelet keeps the certificates that it gets from the cluster.
func CertDir(rootDir string) string { return filepath.Join(rootDir, "pki") }

// ClientCertFile is the kubelet's client certificate with its key, in CertDir
// (k8s.io/client-go/util/certificate, FileStore).
func ClientCertFile(rootDir string) string {
	return filepath.Join(CertDir(rootDir), "kubelet-client-current.pem")
}

// ServingCertFile is the same for the kubelet's serving certificate.
func ServingCertFile(rootDir string) string {
	return filepath.Join(CertDir(rootDir), "kubelet-server-current.pem")
}

// setDiskThresholds makes room in time on small disks without giving away a tenth of a large one. Upstream's shares (10 % for
// the node, 15 % for images) are kept up to 2 and 3 GiB; images are collected before eviction would start.
func setDiskThresholds(kc *kubeletconfig.KubeletConfiguration, size uint64) {
	const nodeMax, imageMax = 2 << 30, 3 << 30
	if size == 0 {
		return
	}
	node, image := min(size/10, nodeMax), min(size*15/100, imageMax)
	kc.EvictionHard = maps.Clone(kc.EvictionHard)
	if kc.EvictionHard == nil {
		kc.EvictionHard = map[string]string{}
	}
	maps.Copy(kc.EvictionHard, map[string]string{
		"memory.available":   "100Mi",
		"nodefs.available":   fmt.Sprintf("%dMi", node>>20),
		"nodefs.inodesFree":  "5%",
		"imagefs.available":  fmt.Sprintf("%dMi", image>>20),
		"imagefs.inodesFree": "5%",
	})
	reserve := int32(image*100/size) + 5
	kc.ImageGCHighThresholdPercent = 100 - reserve
	kc.ImageGCLowThresholdPercent = 100 - reserve - 10
}

// run blocks until ctx ends or the kubelet gives up.
func (k *kubelet) run(ctx context.Context) error {
	deps, err := kubeletapp.UnsecuredDependencies(ctx, k.server, utilfeature.DefaultFeatureGate)
	if err != nil {
		return err
	}
	return kubeletapp.Run(ctx, k.server, deps, utilfeature.DefaultFeatureGate)
}

// hasSystemd says whether systemd is the init of this machine (sd_booted(3)).
func hasSystemd() bool {
	info, err := os.Stat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// canLowerOOMScore says whether this process has CAP_SYS_RESOURCE: without it no process of the machine, a container's runc
// included, may get an oom_score_adj below ours.
func canLowerOOMScore() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// RestrictOOMScoreAdj is for containerd: true on machines where oom_score_adj cannot be lowered.
func RestrictOOMScoreAdj() bool { return !canLowerOOMScore() }

// SystemdCgroup is for containerd: true where systemd owns a cgroup v2 tree. The kubelet asks containerd for it.
func SystemdCgroup() bool {
	var fs unix.Statfs_t
	return hasSystemd() && unix.Statfs("/sys/fs/cgroup", &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
}

// maxOpenFiles is the hard limit of this process.
func maxOpenFiles() int64 {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil || l.Max > 1<<40 {
		return 0
	}
	return int64(l.Max)
}

// diskSize is the size in bytes of the file system that dir, or the directory that it will be made in, is on.
func diskSize(dir string) uint64 {
	var fs unix.Statfs_t
	for unix.Statfs(dir, &fs) != nil {
		if dir == "/" || dir == "." {
			return 0
		}
		dir = filepath.Dir(dir)
	}
	return fs.Blocks * uint64(fs.Bsize)
}

// joinedGates gives kube-proxy the gates that the kubelet's flags set: the process has one set.
func joinedGates(kubeletArgs, proxyArgs []string) (gates []string, others []string) {
	const prefix = "feature-gates="
	for _, a := range slices.Concat(kubeletArgs, proxyArgs) {
		if v, ok := strings.CutPrefix(strings.TrimLeft(a, "-"), prefix); ok {
			gates = append(gates, v)
		}
	}
	for _, a := range proxyArgs {
		if !strings.HasPrefix(strings.TrimLeft(a, "-"), prefix) {
			others = append(others, a)
		}
	}
	return gates, others
}
