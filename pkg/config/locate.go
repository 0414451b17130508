// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// located are the options that say where an installation keeps things, what it looks like from the network, and how it ends.
func located() []string {
	return []string{"config", "data-dir", "run-dir", "kubelet-root-dir", "write-kubeconfig", "private-registry", "node-name", "cluster-cidr", "service-cidr", "cluster-dns",
		"shutdown-grace-period", "shutdown-grace-period-critical"}
}

// Locate tells where a Kedge that is started with args ("server", "--data-dir", "/x") in an environment keeps its files, for commands that
// look after an installation. Only the fields for that are filled, from the same sources as with Load. It judges nothing: what is
// wrong with a value is in the error, and the field has its default then.
func Locate(args, environ []string) (*Config, error) {
	role := RoleServer
	if len(args) > 0 && args[0] == string(RoleAgent) {
		role = RoleAgent
	}
	var s *Config
	action := func(c *cli.Context) (err error) {
		s, err = locate(c, role, environ)
		return err
	}
	app := &cli.App{Name: "kedge", Flags: Flags(role), OnUsageError: UsageError, ExitErrHandler: func(*cli.Context, error) {}, HideHelp: true, HideVersion: true,
		Writer: io.Discard, ErrWriter: io.Discard, Action: action}
	flags := []string{"kedge"}
	if len(args) > 0 {
		flags = append(flags, args[1:]...)
	}
	err := app.Run(flags)
	if s == nil { // flags of another version
		err = errors.Join(err, app.Run(flags[:1]))
	}
	return s, err
}

func locate(c *cli.Context, role Role, environ []string) (*Config, error) {
	env, err := environment(environ)
	errs := []error{err}
	files := fileValues{}
	path, mustExist := configPath(c, env)
	errs = append(errs, files.readFiles(path, mustExist))
	s := &Config{Role: role, Given: map[string]string{}}
	for _, o := range options() {
		if !slices.Contains(located(), o.name) {
			continue
		}
		var values []value
		if role == RoleServer || !o.servers {
			values = o.flagValues(c)
		}
		if values == nil {
			values = env[o.name]
		}
		if values == nil {
			values = files[o.name]
		}
		if len(values) > 0 {
			if err := o.set(s, values); err == nil {
				s.Given[o.name] = values[len(values)-1].source
				continue
			} else {
				errs = append(errs, err)
			}
		}
		if o.def != "" {
			errs = append(errs, o.set(s, []value{{o.def, "default of " + o.name}}))
		}
	}
	if s.NodeName == "" {
		name, err := os.Hostname()
		errs = append(errs, err)
		s.NodeName = strings.ToLower(name)
	}
	if !s.ClusterDNS.IsValid() && len(s.ServiceCIDR) > 0 {
		s.ClusterDNS = s.ServiceCIDR[0].Addr()
		for range 10 {
			s.ClusterDNS = s.ClusterDNS.Next()
		}
	}
	return s, errors.Join(errs...)
}
