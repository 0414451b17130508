// SPDX-License-Identifier: Apache-2.0

package apilb

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/renameio/v2"
	"k8s.io/apimachinery/pkg/util/validation"
)

// list is what the file holds.
type list struct {
	Servers []string `json:"servers"`
}

// ReadFile gives the valid addresses of a balancer's file (Config.File), and an error that says what is wrong with the rest. A missing file is an empty list.
func ReadFile(file string) ([]string, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return decodeList(data)
}

func decodeList(data []byte) ([]string, error) {
	var l list
	if err := json.Unmarshal(data, &l); err != nil {
		return nil, err
	}
	return parseList(l.Servers)
}

// writeList replaces the file. Whenever the power fails, it is there in its old or its new form.
func writeList(file string, servers []string) error {
	data, err := json.MarshalIndent(list{Servers: servers}, "", " ")
	if err != nil {
		return err
	}
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return renameio.WriteFile(file, append(data, '\n'), 0o600, renameio.WithTempDir(dir), renameio.WithStaticPermissions(0o600))
}

// parseList gives the valid addresses in one form, sorted, each once.
func parseList(addresses []string) ([]string, error) {
	var valid []string
	var errs []error
	for _, address := range addresses {
		parsed, err := parseAddress(address, false)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		valid = append(valid, parsed)
	}
	slices.Sort(valid)
	return slices.Compact(valid), errors.Join(errs...)
}

// parseAddress gives host:port in the one form in which addresses are compared. An address to listen on may have port 0.
func parseAddress(address string, listen bool) (string, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", fmt.Errorf("%q is not host:port", address)
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 && !listen {
		return "", fmt.Errorf("%q: the port is not a number from 1 to 65535", address)
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.IsUnspecified() && !listen {
			return "", fmt.Errorf("%q is no address that can be connected to", address)
		}
		host = ip.Unmap().String()
	} else {
		host = strings.ToLower(strings.TrimSuffix(host, "."))
		if len(validation.IsDNS1123Subdomain(host)) > 0 {
			return "", fmt.Errorf("%q: the host is neither an IP address nor a DNS name", address)
		}
	}
	return net.JoinHostPort(host, strconv.FormatUint(number, 10)), nil
}
