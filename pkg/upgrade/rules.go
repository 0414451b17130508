// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/version"
)

// Version of Kedge: that of the Kubernetes inside, and Kedge's own revision.
type Version struct {
	kubernetes *version.Version
	revision   int
	text       string
}

// ParseVersion reads one like v1.37.2+kedge1. The revision of one without "+kedgeN", a kubelet's or one for development, is 0.
func ParseVersion(text string) (Version, error) {
	v, err := version.ParseSemantic(text)
	if err != nil {
		return Version{}, fmt.Errorf("%q is not a version like v1.37.2+kedge1", text)
	}
	revision := 0
	if digits, ok := strings.CutPrefix(v.BuildMetadata(), "kedge"); ok {
		if revision, err = strconv.Atoi(digits); err != nil || revision < 0 {
			return Version{}, fmt.Errorf("%q is not a version like v1.37.2+kedge1", text)
		}
	}
	return Version{v, revision, text}, nil
}

// String is what was parsed.
func (v Version) String() string { return v.text }

// Compare says whether v is older (-1), the same (0) or newer (1) than o.
func (v Version) Compare(o Version) int {
	switch {
	case v.kubernetes.LessThan(o.kubernetes):
		return -1
	case o.kubernetes.LessThan(v.kubernetes):
		return 1
	}
	return max(-1, min(1, v.revision-o.revision))
}

// minors is how many minor versions v is ahead of o.
func (v Version) minors(o Version) int { return int(v.kubernetes.Minor()) - int(o.kubernetes.Minor()) }

// Facts are what decides whether a machine may go to another version. Versions that are empty are not known.
type Facts struct {
	Server   bool              // has a control plane
	Current  string            // version of this machine
	Servers  map[string]string // versions of the other machines with a control plane, by name
	Kubelets map[string]string // versions of other nodes' kubelets, for a server
	Missing  string            // what is not ready here
	NotReady []string          // other servers that are not
	Back     bool              // it goes back to its previous version: as a rule because something is not ready
}

// kubeletSkew is how many minor versions a kubelet may be behind the API servers.
const kubeletSkew = 3

// Judge says what is against a version: all of it. With force, what Kubernetes does not support and what is not sensible are remarks
// instead.
func (f Facts) Judge(to string, force bool) (remarks []string, err error) {
	target, err := ParseVersion(to)
	if err != nil {
		return nil, err
	}
	current, err := ParseVersion(f.Current)
	if err != nil {
		return nil, fmt.Errorf("this machine runs a build without a version: %w", err)
	}
	if target.kubernetes.Major() != current.kubernetes.Major() {
		return nil, fmt.Errorf("from %s to %s is another major version: that takes a new cluster", current, target)
	}
	var against []string
	say := func(format string, args ...any) { against = append(against, fmt.Sprintf(format, args...)) }
	doubt := say
	if f.Back {
		doubt = func(format string, args ...any) { remarks = append(remarks, fmt.Sprintf(format, args...)) }
	}
	if f.Missing != "" {
		doubt("this machine is not ready now, and whether it is after an upgrade says nothing then: %s", f.Missing)
	}
	switch {
	case target.Compare(current) == 0:
		doubt("this machine runs %s already", current)
	case target.minors(current) < 0:
		say("from %s to %s is a step back of a minor version, which Kubernetes does not support: what the newer one has stored may not be readable; "+
			"the snapshot from before the upgrade is the way back", current, target)
	case target.Compare(current) < 0:
		remarks = append(remarks, fmt.Sprintf("%s is older than %s, which runs here", target, current))
	}
	if f.Server {
		f.judgeServer(current, target, say, doubt)
	} else {
		for name, v := range sorted(f.Servers) {
			if server, err := ParseVersion(v); err == nil && target.minors(server) > 0 {
				say("the kubelet must not be newer than the API servers, and %s runs %s: upgrade the servers first", name, server)
			}
		}
	}
	if force {
		return append(remarks, against...), nil
	}
	if len(against) > 0 {
		return remarks, errors.New(strings.Join(against, "; ") + " (--force does it all the same)")
	}
	return remarks, nil
}

func (f Facts) judgeServer(current, target Version, say, doubt func(string, ...any)) {
	if target.minors(current) > 1 {
		say("from %s to %s are %d minor versions, and servers take one at a time: upgrade to a v%d.%d first", current, target, target.minors(current),
			current.kubernetes.Major(), current.kubernetes.Minor()+1)
	}
	for name, v := range sorted(f.Servers) {
		if other, err := ParseVersion(v); err == nil && (target.minors(other) > 1 || target.minors(other) < -1) {
			say("API servers may be one minor version apart, and %s runs %s: upgrade it first", name, other)
		}
	}
	for name, v := range sorted(f.Kubelets) {
		node, err := ParseVersion(v)
		switch {
		case err != nil:
		case target.minors(node) > kubeletSkew:
			say("the node %s runs %s, and may be %d minor versions behind the API servers: upgrade it first", name, node, kubeletSkew)
		case target.minors(node) < 0:
			say("the node %s runs %s, which is newer: its kubelet must not be newer than the API servers", name, node)
		}
	}
	// With two servers each restart takes the majority away for a moment, and with one that there is.
	if len(f.NotReady) > 0 && len(f.Servers) > 1 {
		slices.Sort(f.NotReady)
		doubt("other servers are not ready (%s): with this one starting again, the datastore may lose its majority", strings.Join(f.NotReady, ", "))
	}
}

func sorted(m map[string]string) func(func(string, string) bool) {
	return func(yield func(string, string) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}
