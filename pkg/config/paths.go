// SPDX-License-Identifier: Apache-2.0

package config

// Where things are unless an option says otherwise. Commands other than `kedge server` look there too.
const (
	DefaultConfig     = "/etc/kedge/config.yaml"
	DefaultDataDir    = "/var/lib/kedge"
	DefaultRunDir     = "/run/kedge"
	DefaultKubeconfig = "/etc/kedge/kubeconfig.yaml"
	DefaultRegistries = "/etc/kedge/registries.yaml"
	// DefaultAuditPolicy is for --audit-log.
	DefaultAuditPolicy = "/etc/kedge/audit-policy.yaml"
)
