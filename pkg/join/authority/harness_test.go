// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509/pkix"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	capi "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	certutil "k8s.io/client-go/util/cert"

	"github.com/kedge-io/kedge/pkg/datastore"
	"github.com/kedge-io/kedge/pkg/join"
)

// ask describes a signing request.
type ask struct {
	signer  string
	user    string
	groups  []string
	cn      string
	orgs    []string
	ou      []string
	dns     []string
	ips     []string
	usages  []capi.KeyUsage
	seconds int32
	key     *ecdsa.PrivateKey
}

var (
	agentGroups  = []string{"system:bootstrappers", join.GroupBootstrapAgents, "system:authenticated"}
	serverGroups = append([]string{join.GroupBootstrapServers}, agentGroups...)
	nodeGroups   = []string{join.GroupNodes, "system:authenticated"}
)

// bootstrap is what a machine asks for first.
func bootstrap(name string, groups []string) ask {
	return ask{
		signer: capi.KubeAPIServerClientKubeletSignerName, user: "system:bootstrap:abcdef", groups: groups,
		cn: join.UserNodePrefix + name, orgs: []string{join.GroupNodes},
		usages: []capi.KeyUsage{capi.UsageDigitalSignature, capi.UsageClientAuth},
	}
}

// asServer is what a new server asks for before.
func asServer(name string, groups []string) ask {
	a := bootstrap(name, groups)
	a.signer, a.cn, a.orgs, a.seconds = capi.KubeAPIServerClientSignerName, join.UserServerPrefix+name, []string{join.GroupServers}, 3600
	return a
}

// rotation and serving are what a kubelet asks for.
func rotation(name string) ask {
	a := bootstrap(name, nodeGroups)
	a.user = join.UserNodePrefix + name
	return a
}

func serving(name string, ips ...string) ask {
	a := rotation(name)
	a.signer, a.dns, a.ips = capi.KubeletServingSignerName, []string{name}, ips
	a.usages = []capi.KeyUsage{capi.UsageDigitalSignature, capi.UsageServerAuth}
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a ask) object(t testing.TB, name string) *capi.CertificateSigningRequest {
	t.Helper()
	if a.key == nil {
		a.key = newKey(t)
	}
	var ips []net.IP
	for _, ip := range a.ips {
		ips = append(ips, net.ParseIP(ip))
	}
	pem, err := certutil.MakeCSR(a.key, &pkix.Name{CommonName: a.cn, Organization: a.orgs, OrganizationalUnit: a.ou}, a.dns, ips)
	if err != nil {
		t.Fatal(err)
	}
	csr := &capi.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.Now()},
		Spec: capi.CertificateSigningRequestSpec{
			Request: pem, SignerName: a.signer, Username: a.user, Groups: a.groups, Usages: a.usages,
		},
	}
	if a.seconds != 0 {
		csr.Spec.ExpirationSeconds = &a.seconds
	}
	return csr
}

// cluster is a fake API with an approver, inside a synctest bubble.
type cluster struct {
	*testing.T
	*fake.Clientset
	n    int
	stop func()
	log  *logged
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{T: t, Clientset: fake.NewClientset(), log: &logged{}}
	c.lead()
	return c
}

// lead starts an approver; the one before ends, as with a new leader.
func (c *cluster) lead() {
	c.Helper()
	if c.stop != nil {
		c.stop()
	}
	ctx, cancel := context.WithCancel(c.Context())
	var wg sync.WaitGroup
	a := NewApprover(ApproverConfig{
		Client: c, Networks: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16")},
		ReservedNames: []string{"api.example.org"}, Logger: c.log.logger(),
	})
	wg.Go(func() {
		if err := a.Run(ctx); err != nil {
			c.Error(err)
		}
	})
	c.stop = func() { cancel(); wg.Wait() }
	c.Cleanup(c.stop)
	c.wait(time.Second) // informers are asked ten times a second whether they have synced
}

// ask creates a request, waits until nothing moves any more, and returns the decision: "approved", "pending", or a reason.
func (c *cluster) ask(a ask) string {
	c.Helper()
	return c.decision(c.create(a))
}

func (c *cluster) create(a ask) (name string) {
	c.Helper()
	c.n++
	name = "csr-" + strconv.Itoa(c.n)
	if _, err := c.CertificatesV1().CertificateSigningRequests().Create(c.Context(), a.object(c, name), metav1.CreateOptions{}); err != nil {
		c.Fatal(err)
	}
	synctest.Wait()
	return name
}

func (c *cluster) decision(name string) string {
	c.Helper()
	return decisionOf(c.get(name))
}

func (c *cluster) get(name string) *capi.CertificateSigningRequest {
	c.Helper()
	csr, err := c.CertificatesV1().CertificateSigningRequests().Get(c.Context(), name, metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	return csr
}

func decisionOf(csr *capi.CertificateSigningRequest) string {
	decision := "pending"
	for _, cond := range csr.Status.Conditions {
		switch {
		case decision != "pending":
			return "decided twice"
		case cond.Type == capi.CertificateApproved:
			decision = "approved"
		default:
			decision = cond.Reason
		}
	}
	return decision
}

// message of the last decision.
func (c *cluster) message() string {
	c.Helper()
	conditions := c.get("csr-" + strconv.Itoa(c.n)).Status.Conditions
	if len(conditions) == 0 {
		return ""
	}
	return conditions[0].Message
}

func (c *cluster) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// node makes or replaces a Node; ready is the status of its condition, which is left out if it is empty.
func (c *cluster) node(name string, ready corev1.ConditionStatus, heartbeat time.Time, addresses ...string) *corev1.Node {
	c.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "uid-of-" + "node"}}
	if ready != "" {
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready, LastHeartbeatTime: metav1.NewTime(heartbeat)}}
	}
	for _, a := range addresses {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})
	_, err := c.CoreV1().Nodes().Create(c.Context(), n, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = c.CoreV1().Nodes().Update(c.Context(), n, metav1.UpdateOptions{})
	}
	if err != nil {
		c.Fatal(err)
	}
	synctest.Wait()
	return n
}

func (c *cluster) label(name, label string) {
	c.Helper()
	n, err := c.CoreV1().Nodes().Get(c.Context(), name, metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	n.Labels = map[string]string{label: ""}
	if _, err := c.CoreV1().Nodes().Update(c.Context(), n, metav1.UpdateOptions{}); err != nil {
		c.Fatal(err)
	}
}

// renew is what a kubelet does every ten seconds, by its own clock.
func (c *cluster) renew(name string, at time.Time) { renewLease(c, c.Clientset, name, at) }

func renewLease(t testing.TB, client kubernetes.Interface, name string, at time.Time) {
	t.Helper()
	leases := client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	version := "1" // the fake API has no versions of its own
	old, err := leases.Get(t.Context(), name, metav1.GetOptions{})
	if err == nil {
		n, _ := strconv.Atoi(old.ResourceVersion)
		version = strconv.Itoa(n + 1)
	}
	lease := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: corev1.NamespaceNodeLease, ResourceVersion: version},
		Spec:       coordinationv1.LeaseSpec{RenewTime: new(metav1.NewMicroTime(at)), LeaseDurationSeconds: new(int32(40))},
	}
	if err == nil {
		_, err = leases.Update(t.Context(), lease, metav1.UpdateOptions{})
	} else {
		_, err = leases.Create(t.Context(), lease, metav1.CreateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) events() (reasons []string) { return eventReasons(c, c.Clientset) }

func eventReasons(t testing.TB, client kubernetes.Interface) (reasons []string) {
	t.Helper()
	list, err := client.CoreV1().Events(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list.Items {
		reasons = append(reasons, e.Reason)
	}
	return reasons
}

// logged collects log lines.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *logged) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// fakeMembers is a datastore that does what it is told to.
type fakeMembers struct {
	mu      sync.Mutex
	members []datastore.Member
	err     error // of every change
	calls   []string
}

func (f *fakeMembers) call(text string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, text)
	return f.err
}

func (f *fakeMembers) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

// taken returns the calls since the last time.
func (f *fakeMembers) taken() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

func (f *fakeMembers) List(context.Context) ([]datastore.Member, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.members, nil
}

func (f *fakeMembers) Add(_ context.Context, name, peerURL string) (string, []datastore.Member, error) {
	if err := f.call("add " + name + " " + peerURL); err != nil {
		return "", nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.members = append(f.members, datastore.Member{Name: name, ID: "c0ffee", PeerURLs: []string{peerURL}, Learner: true})
	return "c0ffee", f.members, nil
}

func (f *fakeMembers) Promote(_ context.Context, name string) error { return f.call("promote " + name) }

func (f *fakeMembers) Remove(_ context.Context, name string, force bool) error {
	return f.call("remove " + name + " " + strconv.FormatBool(force))
}
