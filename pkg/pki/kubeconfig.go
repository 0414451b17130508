// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	certutil "k8s.io/client-go/util/cert"
)

// contextName is the name of cluster and context in every kubeconfig.
const contextName = "kedge"

// KubeconfigFile is the path of the kubeconfig of a client certificate: KedgeController,
// KubeletClient or Admin (empty if Config.AdminKubeconfigPath is).
func (p *PKI) KubeconfigFile(n Name) string {
	if n == Admin {
		return p.cfg.AdminKubeconfigPath
	}
	return filepath.Join(p.cfg.KubeconfigDir, string(n)+".kubeconfig")
}

func balancerURL(port int) string { return "https://127.0.0.1:" + strconv.Itoa(port) }

// kubeconfigs returns those kubeconfigs that are not on disk as they should be. Components get references to files, which
// client-go reloads when they change; the admin's stands for itself, so that it can be copied to another machine.
func (p *PKI) kubeconfigs(leaves []leaf) ([]file, error) {
	var files []file
	for _, l := range leaves {
		f := file{path: p.KubeconfigFile(l.name), mode: 0o600}
		cluster, user := clientcmdapi.NewCluster(), clientcmdapi.NewAuthInfo()
		cluster.Server = "https://" + net.JoinHostPort(p.cfg.APIHost, strconv.Itoa(p.cfg.APIPort))
		if l.name == KubeletClient && p.cfg.BalancerPort != 0 {
			cluster.Server = balancerURL(p.cfg.BalancerPort)
		}
		switch l.name {
		case KedgeController, KubeletClient:
			cluster.CertificateAuthority = p.TrustFile(ServerCA)
			user.ClientCertificate, user.ClientKey = p.CertFile(l.name), p.KeyFile(l.name)
		case Admin:
			if f.path == "" {
				continue
			}
			f.mode = p.cfg.AdminKubeconfigMode
			var err error
			if cluster.CertificateAuthorityData, err = p.Trusted(ServerCA); err != nil {
				return nil, fmt.Errorf("kubeconfig of %s: %w", l.name, err)
			}
			for block, rest := pem.Decode(l.pem); block != nil; block, rest = pem.Decode(rest) {
				if block.Type == certutil.CertificateBlockType {
					user.ClientCertificateData = append(user.ClientCertificateData, pem.EncodeToMemory(block)...)
				} else {
					user.ClientKeyData = pem.EncodeToMemory(block)
				}
			}
		default:
			continue
		}
		var err error
		if f.data, err = kubeconfig(l.name, cluster, user); err != nil {
			return nil, err
		}
		if err := os.MkdirAll(filepath.Dir(f.path), 0o755); err != nil {
			return nil, fmt.Errorf("directory of kubeconfig %s: %w", f.path, err)
		}
		same, err := unchanged(f)
		if err != nil {
			return nil, fmt.Errorf("kubeconfig %s: %w", f.path, err)
		}
		if !same {
			files = append(files, f)
		}
	}
	return files, nil
}

func kubeconfig(name Name, cluster *clientcmdapi.Cluster, user *clientcmdapi.AuthInfo) ([]byte, error) {
	config := clientcmdapi.NewConfig()
	config.Clusters[contextName] = cluster
	config.AuthInfos[string(name)] = user
	config.Contexts[contextName] = &clientcmdapi.Context{Cluster: contextName, AuthInfo: string(name)}
	config.CurrentContext = contextName
	data, err := clientcmd.Write(*config)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig of %s: %w", name, err)
	}
	return data, nil
}
