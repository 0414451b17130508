// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/apilb"
	"github.com/kedge-io/kedge/pkg/config"
	"github.com/kedge-io/kedge/pkg/join"
	"github.com/kedge-io/kedge/pkg/join/authority"
	"github.com/kedge-io/kedge/pkg/node"
	"github.com/kedge-io/kedge/pkg/pki"
	"github.com/kedge-io/kedge/pkg/service"
)

// leave has the cluster forget this machine, if there is a cluster beside it.
func (u *run) leave(ctx context.Context) error {
	if membership(u.places.Config) == nil {
		return nil
	}
	st, err := agent.GetStatus(ctx, u.places.RunDir)
	if err != nil && !errors.Is(err, agent.ErrNotRunning) {
		u.say("the Kedge of this machine does not answer: %v", err)
	}
	servers := u.otherServers(st)
	if len(servers) > 0 && u.lastServer(ctx) {
		servers = nil
	}
	if len(servers) == 0 && u.places.Role == config.RoleServer {
		u.say("this is the cluster's only server: the cluster ends with it")
		return nil
	}
	u.say("leaving the cluster")
	if st != nil && st.Phase == "" {
		err = agent.Leave(ctx, u.places.RunDir, u.Force, u.Out)
	} else {
		err = u.leaveStopped(ctx, servers)
	}
	switch {
	case err == nil:
		return nil
	case u.Force:
		u.say("the cluster still counts on this machine (%v): on a server, run `kedge node remove %s`", err, u.places.NodeName)
		return nil
	}
	return fmt.Errorf("nothing was removed: this machine could not leave its cluster: %w. Bring the servers back, or use --force and then "+
		"run `kedge node remove %s` on a server", err, u.places.NodeName)
}

// otherServers are the addresses of those that this machine knows.
func (u *run) otherServers(st *agent.Status) []string {
	list, err := apilb.ReadFile(agent.BalancerFile(u.places.Config))
	if err != nil {
		u.say("the list of servers: %v", err)
	}
	if st != nil {
		for _, s := range st.APIServers {
			if !s.Local {
				list = append(list, s.Address)
			}
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// lastServer tells whether the cluster has no other server any more, if this machine's own API server can say: the list of addresses on disk
// keeps the last one that was known.
func (u *run) lastServer(ctx context.Context) bool {
	if u.places.Role != config.RoleServer {
		return false
	}
	credentials, err := clientcmd.BuildConfigFromFlags("", u.places.WriteKubeconfig)
	if err != nil {
		return false
	}
	credentials.Timeout = 5 * time.Second
	client, err := kubernetes.NewForConfig(credentials)
	if err != nil {
		return false
	}
	servers, err := authority.ListServers(ctx, client)
	_, own := servers[u.places.NodeName]
	return err == nil && own && len(servers) == 1
}

// leaveStopped asks the other servers to remove this machine when its own Kedge does not run.
func (u *run) leaveStopped(ctx context.Context, servers []string) error {
	p := u.places
	kubeconfig := p.WriteKubeconfig
	if p.Role == config.RoleAgent {
		kubeconfig = pki.Agent{Dir: p.PKIDir(), Credentials: node.ClientCertFile(p.KubeletRootDir)}.KubeconfigFile()
	}
	credentials, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	errs := []error{errors.New("no server answers")}
	for _, server := range servers {
		c := rest.CopyConfig(credentials)
		c.Host, c.Timeout = "https://"+server, 30*time.Second
		err := u.removeThrough(ctx, c)
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", server, err))
	}
	return errors.Join(errs...)
}

func (u *run) removeThrough(ctx context.Context, c *rest.Config) error {
	name := u.places.NodeName
	api, err := join.NewAPI(c)
	if err != nil {
		return err
	}
	if u.places.Role == config.RoleAgent {
		return api.RemoveNode(ctx, name)
	}
	client, err := kubernetes.NewForConfig(c)
	if err != nil {
		return err
	}
	remover := &authority.Remover{Client: client, API: api}
	plan, err := remover.Plan(ctx, name)
	if err != nil {
		return err
	}
	u.say("%s", plan)
	if plan.BreaksQuorum() && !u.Force {
		return errors.New("the datastore would lose its majority; bring the other servers back first")
	}
	return remover.Remove(ctx, name, u.Force)
}

// stop ends the pods in an orderly way, as far as Kedge is there to do that, and the service.
func (u *run) stop(ctx context.Context) error {
	errs := []error{service.Disable(ctx)}
	st, err := agent.GetStatus(ctx, u.places.RunDir)
	switch {
	case err == nil:
		u.say("stopping Kedge and its pods")
		stop := func(ctx context.Context) error { return service.Stop(ctx, st.PID) }
		if err := agent.StopPods(ctx, u.places.RunDir, agent.StopOptions{Remove: true}, u.Out, stop); err != nil {
			u.say("%v", err)
			errs = append(errs, service.Stop(ctx, st.PID))
		}
	default:
		errs = append(errs, service.Stop(ctx, 0)) // it may be about to start
		if err := stopPodsAlone(ctx, u.places, agent.StopOptions{Remove: true}, u.Out); err != nil {
			u.say("the pods cannot end in an orderly way: %v", err)
		}
	}
	return errors.Join(errs...)
}
