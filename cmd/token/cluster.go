// SPDX-License-Identifier: Apache-2.0

package token

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	certutil "k8s.io/client-go/util/cert"
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"

	"github.com/kedge-io/kedge/cmd/output"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/pki"
)

// errNoAnswer is behind errors of an API that could not be asked.
var errNoAnswer = errors.New("the API does not answer")

// cluster is where the tokens are.
type cluster struct {
	api    kubernetes.Interface
	url    string
	caHash string
	local  func() ([]net.Addr, error) // this machine's addresses
}

// open reads an administrator's kubeconfig.
func open(path string) (*cluster, error) {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no %s: tokens are managed on a server of the cluster, after its first start; elsewhere give an administrator's kubeconfig with --kubeconfig", path)
	}
	// Without fallbacks to other files, the environment or a service account.
	file, err := clientcmd.LoadFromFile(path)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%s may be read by root only: use sudo", path)
	}
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	config, err := clientcmd.NewDefaultClientConfig(*file, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	config.Timeout = 10 * time.Second
	if err := rest.LoadTLSFiles(config); err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	certs, err := certutil.ParseCertsPEM(config.CAData)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: the cluster's CA, whose hash is part of a token: %w", path, err)
	}
	api, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	return &cluster{api: api, url: config.Host, caHash: pki.HashOfCertificate(certs[0]), local: net.InterfaceAddrs}, nil
}

func (cl *cluster) secrets() typedcorev1.SecretInterface {
	return cl.api.CoreV1().Secrets(metav1.NamespaceSystem)
}

// explain says what to do about an API that does not answer; what the API itself says is left as it is.
func (cl *cluster) explain(doing string, err error) error {
	if err == nil {
		return nil
	}
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return fmt.Errorf("%s: %w at %s; `kedge status` on a server says why: %w", doing, errNoAnswer, cl.url, err)
}

// create makes a token with the role and description of want and prints it.
func (cl *cluster) create(ctx context.Context, out io.Writer, want join.Info, ttl time.Duration, bare bool) error {
	t, err := join.New()
	if err != nil {
		return err
	}
	t.CAHash = cl.caHash
	address := ""
	if !bare {
		if address, err = cl.address(ctx); err != nil {
			return err
		}
	}
	now := time.Now()
	if _, err := cl.secrets().Create(ctx, t.Object(want.Role, ttl, want.Description), metav1.CreateOptions{}); err != nil {
		return cl.explain("create a token", err)
	}
	if bare {
		_, err := fmt.Fprintln(out, t.Text())
		return err
	}
	return writeToken(out, t, want.Role, ttl, address, now)
}

// address for others to reach the API at: the floating one; else this machine's if it is a server, or any server's; empty when none is
// known.
func (cl *cluster) address(ctx context.Context) (string, error) {
	all, err := cl.registered(ctx)
	if err == nil && len(all) == 0 {
		all, err = cl.announced(ctx)
	}
	if err != nil {
		return "", cl.explain("find the servers' addresses", err)
	}
	if len(all) == 0 {
		return "", nil
	}
	if vip, err := cl.floating(ctx); err != nil {
		return "", cl.explain("find the API's floating address", err)
	} else if _, port, err := net.SplitHostPort(all[0]); err == nil && vip.IsValid() {
		return net.JoinHostPort(vip.String(), port), nil
	}
	local, err := cl.local()
	if err != nil {
		return "", fmt.Errorf("this machine's addresses: %w", err)
	}
	for _, address := range all {
		if isLocal(address, local) {
			return address, nil
		}
	}
	return all[0], nil
}

// floating is the first address of --api-vip; invalid if there is none.
func (cl *cluster) floating(ctx context.Context) (netip.Addr, error) {
	m, err := cl.api.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, join.ConfigMapCluster, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return netip.Addr{}, nil
	}
	if err != nil {
		return netip.Addr{}, err
	}
	var settings config.Cluster
	if err := json.Unmarshal([]byte(m.Data[join.KeyCluster]), &settings); err != nil || len(settings.APIVIP) == 0 {
		return netip.Addr{}, nil //nolint:nilerr // what is damaged has no address; those who join say so
	}
	return settings.APIVIP[0], nil
}

// registered addresses, in the order of the servers' names.
func (cl *cluster) registered(ctx context.Context) (all []string, err error) {
	m, err := cl.api.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, join.ConfigMapServers, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, node := range slices.Sorted(maps.Keys(m.Data)) {
		var s join.RegisteredServer
		if err := json.Unmarshal([]byte(m.Data[node]), &s); err == nil && s.Address != "" {
			all = append(all, s.Address)
		}
	}
	return all, nil
}

// announced addresses are those that pods use: the endpoints of the Service kubernetes.
func (cl *cluster) announced(ctx context.Context) (all []string, err error) {
	slice, err := cl.api.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Get(ctx, "kubernetes", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range slice.Endpoints {
		for _, p := range slice.Ports {
			if len(e.Addresses) > 0 && p.Port != nil {
				all = append(all, net.JoinHostPort(e.Addresses[0], fmt.Sprint(*p.Port)))
			}
		}
	}
	return all, nil
}

func isLocal(address string, local []net.Addr) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(local, func(a net.Addr) bool {
		prefix, err := netip.ParsePrefix(a.String())
		return err == nil && prefix.Addr().String() == host
	})
}

func (cl *cluster) list(ctx context.Context, out, problems io.Writer, format string) error {
	secrets, err := cl.secrets().List(ctx, metav1.ListOptions{FieldSelector: "type=" + string(bootstrapapi.SecretTypeBootstrapToken)})
	if err != nil {
		return cl.explain("list the tokens", err)
	}
	entries := []entry{}
	for _, s := range secrets.Items {
		i, err := join.FromSecret(&s)
		if err != nil {
			fmt.Fprintln(problems, "kedge:", err)
			continue
		}
		entries = append(entries, newEntry(i))
	}
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Or(cmp.Compare(a.Role, b.Role), cmp.Compare(a.ID, b.ID)) })
	return output.Write(out, format, entries, func(w io.Writer) error { return writeList(w, entries, time.Now()) })
}

// idOf takes the ID of a token or all of it.
func idOf(arg string) (string, error) {
	if regexp.MustCompile(bootstrapapi.BootstrapTokenIDPattern).MatchString(arg) {
		return arg, nil
	}
	t, err := join.Parse(arg)
	if err != nil {
		return "", fmt.Errorf("neither the ID of a token (`kedge token list` shows them) nor a token: %w", err)
	}
	return t.ID, nil
}

func (cl *cluster) delete(ctx context.Context, out io.Writer, args []string) error {
	var errs []error
	for _, arg := range args {
		errs = append(errs, cl.deleteOne(ctx, out, arg))
	}
	return errors.Join(errs...)
}

func (cl *cluster) deleteOne(ctx context.Context, out io.Writer, arg string) error {
	id, err := idOf(arg)
	if err != nil {
		return err
	}
	_, i, err := cl.get(ctx, id)
	if i == nil && err != nil {
		return err
	}
	if err := cl.explain("delete token "+id, cl.secrets().Delete(ctx, join.SecretName(id), metav1.DeleteOptions{})); err != nil {
		return err
	}
	remark := ""
	if i.Token.Derived {
		remark = "; it comes from an option of the servers, and the next start of one brings it back unless the option is changed on all of them"
	}
	_, err = fmt.Fprintf(out, "token %s deleted%s\n", id, remark)
	return err
}

// get reads a token. When its Secret is there but damaged, there is an error and an empty Info.
func (cl *cluster) get(ctx context.Context, id string) (*corev1.Secret, *join.Info, error) {
	s, err := cl.secrets().Get(ctx, join.SecretName(id), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil, fmt.Errorf("there is no token %s in the cluster: it has expired or was deleted, or is another cluster's (`kedge token list` shows all)", id)
	}
	if err != nil {
		return nil, nil, cl.explain("read token "+id, err)
	}
	i, err := join.FromSecret(s)
	return s, &i, err
}

// rotate makes the new token first: nobody is left without one when something fails. A negative ttl is that of the old token.
func (cl *cluster) rotate(ctx context.Context, out io.Writer, arg string, ttl time.Duration, bare bool) error {
	id, err := idOf(arg)
	if err != nil {
		return err
	}
	s, i, err := cl.get(ctx, id)
	switch {
	case err != nil:
		return err
	case i.Role == "":
		return fmt.Errorf("token %s is not for joining machines to Kedge, something else made it: it can be deleted, not rotated", id)
	case i.Token.Derived:
		return fmt.Errorf("token %s comes from an option of the servers (token or token-file): change it there on all servers and restart them", id)
	}
	if ttl < 0 {
		ttl = 0
		if !i.Expires.IsZero() {
			ttl = i.Expires.Sub(i.Created).Round(time.Second)
		}
	}
	if err := cl.create(ctx, out, *i, ttl, bare); err != nil {
		return err
	}
	err = cl.secrets().Delete(ctx, s.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &s.UID}})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("the new token is valid, and so is the old one still; run `kedge token delete %s`: %w", id, cl.explain("delete the old token", err))
	}
	return nil
}
