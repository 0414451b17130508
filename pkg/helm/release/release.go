// SPDX-License-Identifier: Apache-2.0

// Package release does the work of a `kedge [helm]` process with Helm's library: it installs, upgrades or removes one release.
package release

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"helm.sh/helm/v4/pkg/action"
	charts "helm.sh/helm/v4/pkg/chart"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/cli"
	"helm.sh/helm/v4/pkg/kube"
	"helm.sh/helm/v4/pkg/registry"
	"helm.sh/helm/v4/pkg/release/common"
	release "helm.sh/helm/v4/pkg/release/v1"
	"helm.sh/helm/v4/pkg/storage/driver"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericclioptions"

	"github.com/kedge-io/kedge/pkg/helm"
)

const (
	// history is how many revisions of a release are kept.
	history = 5
	// answerTimeout is how long a registry may take to begin an answer.
	answerTimeout = 30 * time.Second
	// label is on releases of HelmCharts. One that is pending was left by a process that was killed, as only the leader works on them.
	label = "kedge.io/helmchart"
)

// worker has what one piece of work needs.
type worker struct {
	req     helm.Request
	timeout time.Duration
	cfg     *action.Configuration
}

// Do does what a request says.
func Do(ctx context.Context, req helm.Request) helm.Result {
	w := &worker{req: req, timeout: helm.DefaultTimeout}
	if req.Spec.Timeout != nil {
		w.timeout = req.Spec.Timeout.Duration
	}
	// Helm's files, of which none is kept; without them it would look into the home directory.
	for _, name := range []string{"HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"} {
		if err := os.Setenv(name, filepath.Join(req.Scratch, strings.ToLower(name))); err != nil {
			return helm.Result{Error: err.Error()}
		}
	}
	if err := w.open(); err != nil {
		return helm.Result{Error: err.Error()}
	}
	before := w.last()
	var err error
	switch req.Verb {
	case helm.Deploy:
		err = w.deploy(ctx, before)
	case helm.Uninstall:
		err = w.uninstall()
	default:
		err = fmt.Errorf("there is no verb %q", req.Verb)
	}
	return w.result(before, err)
}

func (w *worker) open() error {
	flags := genericclioptions.NewConfigFlags(false)
	flags.KubeConfig, flags.Namespace = &w.req.Kubeconfig, &w.req.Namespace
	w.cfg = action.NewConfiguration(action.ConfigurationSetLogger(slog.NewTextHandler(os.Stderr, nil)))
	return w.cfg.Init(flags, w.req.Namespace, "secret")
}

// last is the newest revision of the release, nil if there is none.
func (w *worker) last() *release.Release {
	r, err := w.cfg.Releases.Last(w.req.Name)
	if err != nil {
		return nil
	}
	rel, _ := r.(*release.Release)
	return rel
}

// result says what there is now.
func (w *worker) result(before *release.Release, err error) helm.Result {
	var res helm.Result
	now := w.last()
	if now != nil {
		res.Status, res.Revision = now.Info.Status.String(), now.Version
		if now.Chart != nil && now.Chart.Metadata != nil {
			res.Chart, res.AppVersion = now.Chart.Name()+"-"+now.Chart.Metadata.Version, now.Chart.AppVersion()
		}
		res.Touched = before == nil || before.Version != now.Version
	}
	if err != nil {
		res.Error = err.Error()
		res.RolledBack = res.Touched && before != nil && now != nil && now.Info.Status == common.StatusDeployed
	}
	return res
}

func (w *worker) deploy(ctx context.Context, last *release.Release) error {
	ch, err := w.chart(ctx)
	if err != nil {
		return fmt.Errorf("the chart: %w", err)
	}
	values, err := values(w.req.Spec)
	if err != nil {
		return err
	}
	if last != nil && last.Info.Status.IsPending() {
		if err := w.unlock(last); err != nil {
			return err
		}
	}
	if last == nil || last.Info.Status == common.StatusUninstalled || last.Info.Status == common.StatusUninstalling {
		return w.install(ctx, ch, values)
	}
	return w.upgrade(ctx, ch, values)
}

// unlock ends what a process that is gone had begun.
func (w *worker) unlock(last *release.Release) error {
	if age := time.Since(last.Info.LastDeployed); last.Labels[label] == "" && age < 2*w.timeout {
		return fmt.Errorf("another Helm works on this release since %s (%s)", age.Round(time.Second), last.Info.Status)
	}
	last.SetStatus(common.StatusFailed, "the process that worked on it was interrupted")
	return w.cfg.Releases.Update(last)
}

func (w *worker) install(ctx context.Context, ch *chart.Chart, values map[string]any) error {
	in := action.NewInstall(w.cfg)
	in.ReleaseName, in.Namespace, in.CreateNamespace = w.req.Name, w.req.Namespace, w.req.Spec.CreateNamespace
	in.Timeout, in.WaitStrategy = w.timeout, kube.StatusWatcherStrategy
	in.TakeOwnership, in.ForceConflicts, in.Replace = w.req.Spec.TakeOwnership, true, true
	in.Labels = map[string]string{label: w.req.Own}
	_, err := in.RunWithContext(ctx, ch, values)
	return err
}

func (w *worker) upgrade(ctx context.Context, ch *chart.Chart, values map[string]any) error {
	up := action.NewUpgrade(w.cfg)
	up.Namespace, up.Timeout, up.WaitStrategy, up.MaxHistory = w.req.Namespace, w.timeout, kube.StatusWatcherStrategy, history
	up.ResetValues, up.TakeOwnership = true, w.req.Spec.TakeOwnership
	// Fields that somebody changed by hand are the chart's again, as with manifests.
	up.ServerSideApply, up.ForceConflicts = "true", true
	up.CleanupOnFail = true
	up.Labels = map[string]string{label: w.req.Own}
	// Without a revision that worked there is nothing to go back to.
	_, err := w.cfg.Releases.Deployed(w.req.Name)
	up.RollbackOnFailure = err == nil
	_, err = up.RunWithContext(ctx, w.req.Name, ch, values)
	return err
}

func (w *worker) uninstall() error {
	un := action.NewUninstall(w.cfg)
	un.IgnoreNotFound, un.Timeout, un.WaitStrategy = true, w.timeout, kube.StatusWatcherStrategy
	un.DeletionPropagation = "background"
	_, err := un.Run(w.req.Name)
	if errors.Is(err, driver.ErrReleaseNotFound) {
		return nil
	}
	return err
}

// chart gets the chart from wherever it is.
func (w *worker) chart(ctx context.Context) (*chart.Chart, error) {
	ch, err := w.load(ctx)
	if err != nil {
		return nil, err
	}
	if err := ch.Validate(); err != nil {
		return nil, err
	}
	if t := ch.Metadata.Type; t != "" && t != "application" {
		return nil, fmt.Errorf("%s is a chart of type %s, which cannot be installed", ch.Name(), t)
	}
	var needs []charts.Dependency
	for _, d := range ch.Metadata.Dependencies {
		needs = append(needs, d)
	}
	if err := action.CheckDependencies(ch, needs); err != nil {
		return nil, fmt.Errorf("%w: package it with `helm package --dependency-update`", err)
	}
	return ch, nil
}

func (w *worker) load(ctx context.Context) (*chart.Chart, error) {
	s := w.req.Spec
	if s.ChartContent != "" {
		b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(s.ChartContent), ""))
		if err != nil {
			return nil, fmt.Errorf("chartContent: %w; make it with `base64 -w0 CHART.tgz`", err)
		}
		return loader.LoadArchive(bytes.NewReader(b))
	}
	if path, ok := w.file(); ok {
		ch, err := loader.Load(path)
		if err != nil {
			return nil, fmt.Errorf("%w (on this server, %s; put the chart on all servers, or into chartContent)", err, hostname())
		}
		return ch, nil
	}
	o := action.ChartPathOptions{RepoURL: s.Repo, Version: s.Version, PassCredentialsAll: s.AuthPassCredentials,
		InsecureSkipTLSVerify: s.InsecureSkipTLSVerify, PlainHTTP: s.PlainHTTP}
	if s.RepoCA != "" {
		o.CaFile = filepath.Join(w.req.Scratch, "ca.pem")
		if err := os.WriteFile(o.CaFile, []byte(s.RepoCA), 0o600); err != nil {
			return nil, err
		}
	}
	if s.AuthSecret != nil {
		if err := w.credentials(ctx, s.AuthSecret.Name, &o); err != nil {
			return nil, err
		}
	}
	transport, err := transport(s)
	if err != nil {
		return nil, err
	}
	options := []registry.ClientOption{registry.ClientOptWriter(os.Stderr), registry.ClientOptCredentialsFile(filepath.Join(w.req.Scratch, "registry.json")),
		registry.ClientOptHTTPClient(&http.Client{Transport: transport})}
	if o.PlainHTTP {
		options = append(options, registry.ClientOptPlainHTTP())
	}
	if o.Username != "" {
		options = append(options, registry.ClientOptBasicAuth(o.Username, o.Password))
	}
	client, err := registry.NewClient(options...)
	if err != nil {
		return nil, err
	}
	w.cfg.RegistryClient = client
	in := action.NewInstall(w.cfg) // its client is the only way to hand one over
	o, in.ChartPathOptions = in.ChartPathOptions, o
	in.SetRegistryClient(client)
	path, err := in.LocateChart(s.Chart, cli.New())
	if err != nil {
		return nil, err
	}
	return loader.Load(path)
}

// transport is for registries. Helm's library does the same for repositories, but leaves the client of a registry as it is handed over.
func transport(s helm.Spec) (http.RoundTripper, error) {
	t, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return nil, errors.New("the HTTP client of this program is not the standard one")
	}
	t = t.Clone()
	t.ResponseHeaderTimeout = answerTimeout
	t.TLSClientConfig = &tls.Config{InsecureSkipVerify: s.InsecureSkipTLSVerify}
	if s.RepoCA != "" {
		t.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM([]byte(s.RepoCA)) {
			return nil, errors.New("repoCA: there is no certificate in PEM in it")
		}
	}
	return t, nil
}

// file is where a chart is on this machine, if it is named as a file.
func (w *worker) file() (string, bool) {
	name := w.req.Spec.Chart
	if path, ok := strings.CutPrefix(name, "file://"); ok {
		return path, true
	}
	if filepath.IsAbs(name) {
		return name, true
	}
	isArchive := slices.Contains([]string{".tgz", ".gz"}, filepath.Ext(name))
	if w.req.Spec.Repo == "" && !strings.Contains(name, "://") && isArchive {
		return filepath.Join(w.req.ChartsDir, filepath.Clean("/"+name)), true
	}
	return "", false
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "whose name is unknown"
	}
	return name
}

// credentials are those of a Secret beside the HelmChart.
func (w *worker) credentials(ctx context.Context, name string, o *action.ChartPathOptions) error {
	client, err := w.cfg.KubernetesClientSet()
	if err != nil {
		return err
	}
	secret, err := client.CoreV1().Secrets(w.req.Own).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("authSecret: %w", err)
	}
	o.Username, o.Password = string(secret.Data[corev1.BasicAuthUsernameKey]), string(secret.Data[corev1.BasicAuthPasswordKey])
	if o.Username == "" {
		return fmt.Errorf("authSecret: the Secret %s/%s has no username; its type has to be %s", w.req.Own, name, corev1.SecretTypeBasicAuth)
	}
	return nil
}
