// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// Load puts the configuration of `kedge server` or `kedge agent` together: defaults < file < file.d/*.yaml < KEDGE_ variables < flags.
// A later source replaces the value of an earlier one, lists too. The error names everything that is wrong, one
// problem a line, each with its source. errors.Is(err, ErrNoNodeAddress) says that the network may just not be up yet.
func Load(c *cli.Context, role Role) (*Config, error) {
	return load(c, role, os.Environ(), thisMachine)
}

// LoadToCheck is Load for a machine on which Kedge is not to start yet. later has what has to be there when it does: the files of tokens
// of one's own on a first server, which nobody needs before. For a machine that joins, a file that is missing is an error all the same.
func LoadToCheck(c *cli.Context, role Role) (s *Config, later []error, err error) {
	s, err = load(c, role, os.Environ(), func() (machine, error) {
		m, err := thisMachine()
		m.later = &later
		return m, err
	})
	return s, later, err
}

func load(c *cli.Context, role Role, environ []string, look func() (machine, error)) (*Config, error) {
	if c.Args().Present() {
		return nil, fmt.Errorf("unexpected argument %q: only flags are accepted (a switch is written --debug or --debug=true)", c.Args().First())
	}
	var errs []error
	env, err := environment(environ)
	errs = append(errs, err)
	files := fileValues{}
	path, mustExist := configPath(c, env)
	if filepath.IsAbs(path) { // what else is wrong with it is reported with the other values
		errs = append(errs, files.readFiles(path, mustExist))
	}

	s := &Config{Role: role, Given: map[string]string{}}
	sources := map[string]string{}
	for _, o := range options() {
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
			s.Given[o.name] = values[len(values)-1].source
			if role == RoleAgent && o.servers {
				errs = append(errs, fmt.Errorf("%s: is for servers only; an agent takes what it needs from the cluster, leave it out", s.Given[o.name]))
				continue
			}
		}
		if values == nil && o.def != "" {
			values = []value{{o.def, "default of " + o.name}}
		}
		sources[o.name] = "default of " + o.name
		if len(values) > 0 {
			sources[o.name] = values[len(values)-1].source
			errs = append(errs, o.set(s, values))
		}
	}
	m, err := look()
	if err != nil {
		return nil, errors.Join(append(errs, err)...)
	}
	errs = append(errs, s.complete(m, sources), s.validate(m, sources))
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return s, nil
}

// environment sorts the KEDGE_ variables by option. Empty ones count as not set.
func environment(environ []string) (map[string][]value, error) {
	all := options()
	values := map[string][]value{}
	var errs []error
	for _, entry := range environ {
		name, text, _ := strings.Cut(entry, "=")
		if !strings.HasPrefix(name, envPrefix) || text == "" {
			continue
		}
		index := slices.IndexFunc(all, func(o *option) bool { return o.env() == name })
		if index < 0 {
			optionName := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, envPrefix), "_", "-"))
			errs = append(errs, unknownName("environment variable", name, optionName, (*option).env))
			continue
		}
		values[all[index].name] = all[index].envValues(text)
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return values, errors.Join(errs...)
}

// configPath says where the configuration file is and whether it must exist: only the default one may be missing.
func configPath(c *cli.Context, env map[string][]value) (string, bool) {
	for _, o := range options() {
		if o.name != "config" {
			continue
		}
		values := o.flagValues(c)
		if values == nil {
			values = env[o.name]
		}
		if values == nil {
			return o.def, false
		}
		return values[0].text, true
	}
	return "", false
}
