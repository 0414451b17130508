// SPDX-License-Identifier: Apache-2.0

// Package scripts tests install.sh where that needs no machine: with shellcheck, and its functions in the shells that run it.
// tests/install installs with it.
package scripts

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// tools are programs of Debian that a build machine need not have.
type tools struct{ dir string }

// newTools fetches packages into the user's cache, once; root is not needed.
func newTools(t *testing.T, packages ...string) tools {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	dir := filepath.Join(cache, "kedge-tests", strings.Join(packages, "-"))
	if _, err := os.Stat(filepath.Join(dir, "packages")); err == nil {
		return tools{dir}
	}
	// Another test process may fetch the same.
	temp, err := os.MkdirTemp("", "debs-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(temp)
	if out, err := exec.Command("./debs", append([]string{runtime.GOARCH, temp}, packages...)...).CombinedOutput(); err != nil {
		t.Skipf("%v is not here and cannot be fetched: %v: %s", packages, err, out)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command("cp", "-a", temp, dir+fmt.Sprint(".", os.Getpid())).Run(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir+fmt.Sprint(".", os.Getpid()), dir); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	return tools{dir}
}

// command gives the program of the PATH, or the one that Debian has.
func command(t *testing.T, name, pkg, path string) []string {
	t.Helper()
	if found, err := exec.LookPath(name); err == nil {
		return []string{found}
	}
	root := filepath.Join(newTools(t, pkg).dir, "root")
	program := filepath.Join(root, path)
	if strings.Contains(pkg, "static") {
		return []string{program}
	}
	// Run by the loader that came with it: the machine's own libraries may be others.
	loader, err := filepath.Glob(filepath.Join(root, "lib*", "ld-linux-*.so.*"))
	if err != nil || len(loader) == 0 {
		return []string{program}
	}
	libs, err := filepath.Glob(filepath.Join(root, "lib", "*-linux-gnu"))
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob(filepath.Join(root, "usr", "lib", "*-linux-gnu"))
	if err != nil {
		t.Fatal(err)
	}
	return []string{loader[0], "--library-path", strings.Join(append(libs, more...), ":"), program}
}

func TestShellcheck(t *testing.T) {
	args := append(command(t, "shellcheck", "shellcheck", "usr/bin/shellcheck"), "--shell=sh", "install.sh")
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// shells are what runs install.sh on other people's machines.
func shells(t *testing.T) map[string][]string {
	t.Helper()
	all := map[string][]string{}
	for _, name := range []string{"dash", "bash"} {
		if path, err := exec.LookPath(name); err == nil {
			all[name] = []string{path}
		}
	}
	all["bash"] = append(all["bash"], "--posix")
	all["busybox"] = append(command(t, "busybox", "busybox-static", "bin/busybox"), "ash")
	return all
}

// functions is install.sh without its last line, which runs it.
func functions(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("install.sh")
	if err != nil {
		t.Fatal(err)
	}
	text, ok := strings.CutSuffix(string(data), "\nmain \"$@\"\n")
	if !ok {
		t.Fatal("install.sh does not end with its main line: a download that was cut off could do half of the work")
	}
	return text
}

// call runs a line of shell after the functions.
func call(t *testing.T, shell []string, env []string, line string, args ...string) (string, error) {
	t.Helper()
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte(functions(t)+"\n"+line+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(shell[0], append(append(append([]string{}, shell[1:]...), script), args...)...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// TestCommandLine: what stands in the service, from arguments and variables.
func TestCommandLine(t *testing.T) {
	const program = "/usr/local/bin/kedge "
	tests := []struct {
		name, env, args, systemd string
		openrc                   []string // as the shell takes it apart
	}{
		{"nothing", "", "", "server", []string{"server"}},
		{"agent by variables", "KEDGE_URL=https://10.0.0.1:6443 KEDGE_TOKEN=secret-secret", "",
			"agent --server https://10.0.0.1:6443 --token-file /etc/kedge/token", nil},
		{"server by variables", "KEDGE_URL=https://10.0.0.1:6443 KEDGE_TOKEN=secret-secret", "server",
			"server --server https://10.0.0.1:6443 --token-file /etc/kedge/token", nil},
		{"a token of one's own", "KEDGE_TOKEN=secret-secret", "", "server --token-file /etc/kedge/token", nil},
		{"tokens by options", "", "server --token secret-secret --agent-token=secret-agents --node-ip 10.0.0.1",
			"server --token-file /etc/kedge/token --agent-token-file /etc/kedge/agent-token --node-ip 10.0.0.1", nil},
		{"short ones", "", "agent -t secret-secret -s https://h:6443", "agent --token-file /etc/kedge/token -s https://h:6443", nil},
		{"quoting", "", `server 'a b' '' 'x"y' 'q\z' '50%' '$HOME' "it's" 'a;b' '<&>'`,
			`server "a b" "" "x\"y" "q\\z" 50%% "$$HOME" "it's" "a;b" "<&>"`, []string{"server", "a b", "", `x"y`, `q\z`, "50%", "$HOME", "it's", "a;b", "<&>"}},
		{"own options first", "", "--dry-run --timeout 5 server --debug", "server --debug", nil},
	}
	for name, shell := range shells(t) {
		for _, test := range tests {
			t.Run(name+"/"+test.name, func(t *testing.T) {
				env := strings.Fields(test.env)
				line := `eval "set -- $1"; parse "$@"; init=systemd service=/nonexistent; command_line; ! env | grep secret || echo "the environment has a secret"`
				got, err := call(t, shell, env, line, test.args)
				if err != nil || got != program+test.systemd {
					t.Errorf("systemd: %v\n got %s\nwant %s", err, got, program+test.systemd)
				}
				if test.openrc == nil {
					return
				}
				// As the init script does: assign, then eval.
				line = `eval "set -- $1"; parse "$@"; init=openrc service=/nonexistent; eval "command_args=$(command_line)"; eval "set -- $command_args"; printf '[%s]\n' "$@"`
				got, err = call(t, shell, env, line, test.args)
				if want := "[" + strings.Join(test.openrc, "]\n[") + "]"; err != nil || got != want {
					t.Errorf("OpenRC: %v\n got %s\nwant %s", err, got, want)
				}
			})
		}
	}
}

// TestArguments: what is refused before anything is looked at.
func TestArguments(t *testing.T) {
	tests := []struct{ name, env, args, want string }{
		{"unknown option", "", "--node-ip 10.0.0.1", "--node-ip is not known here (options of kedge come after server or agent)"},
		{"no value", "", "--config", "--config takes a value"},
		{"no token", "", "server --token", "--token takes a value"},
		{"empty token", "", "server --token=", "--token is empty"},
		{"missing file", "", "--config /nonexistent", "/nonexistent cannot be read"},
		{"timeout", "", "--timeout 5m", "a number of seconds is wanted"},
		{"both URLs", "KEDGE_URL=https://a:6443", "agent --server https://b:6443", "KEDGE_URL and --server are both given"},
		{"both tokens", "KEDGE_TOKEN=abc", "server -t def", "KEDGE_TOKEN and --token are both given"},
		{"another variable", "KEDGE_NODE_IP=10.0.0.1", "server", "give KEDGE_NODE_IP as an option"},
		{"several lines", "", "server 'a\nb'", "must not have several lines"},
	}
	for name, shell := range shells(t) {
		for _, test := range tests {
			t.Run(name+"/"+test.name, func(t *testing.T) {
				got, err := call(t, shell, strings.Fields(test.env), `eval "set -- $1"; parse "$@"; echo accepted`, test.args)
				if err == nil || !strings.Contains(got, test.want) {
					t.Errorf("got %v: %s\nwant %s", err, got, test.want)
				}
			})
		}
	}
}

// TestNoexec with a table of mounts in place of the machine's.
func TestNoexec(t *testing.T) {
	mounts := filepath.Join(t.TempDir(), "mounts")
	if err := os.WriteFile(mounts, []byte(`overlay / overlay rw 0 0
/dev/sda1 /var ext4 rw,noexec 0 0
/dev/sda2 /var/lib/kedge ext4 rw 0 0
/dev/sdb1 /var/lib/kedge2 vfat rw,noexec,nosuid 0 0
`), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, shell := range shells(t) {
		for dir, want := range map[string]string{"/usr/local/bin": "no", "/var/lib": "yes", "/var/lib/kedge": "no", "/var/lib/kedge2/x": "yes", "/variable": "no"} {
			t.Run(name+dir, func(t *testing.T) {
				line := strings.ReplaceAll(functions(t), "/proc/mounts", mounts)
				script := filepath.Join(t.TempDir(), "script")
				if err := os.WriteFile(script, []byte(line+"\nif noexec "+dir+"; then echo yes; else echo no; fi\n"), 0o644); err != nil {
					t.Fatal(err)
				}
				out, err := exec.Command(shell[0], append(shell[1:], script)...).CombinedOutput()
				if got := strings.TrimSpace(string(out)); err != nil || got != want {
					t.Errorf("%v: %s; want %s", err, got, want)
				}
			})
		}
	}
}
