// SPDX-License-Identifier: Apache-2.0

package install

import (
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

const goarch = runtime.GOARCH

func run(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	return string(out), err
}

// forge makes directories like the release: one with a file that was changed, one whose changes were signed by somebody else, and
// one for another architecture.
const forge = `
set -e
cd ` + stick + `
for d in damaged forged foreign; do mkdir /root/$d; cp -r $(ls | grep -vx kedge) /root/$d/; ln -s $PWD/kedge /root/$d/; echo >>/root/$d/README.md; done
openssl genpkey -algorithm ed25519 -out /root/other.key
cd /root/foreign
rm kedge; head -c 64 ` + stick + `/kedge >kedge; printf '\001' | dd of=kedge bs=1 seek=18 conv=notrunc 2>/dev/null
for d in forged foreign; do
	cd /root/$d
	openssl pkey -in /root/other.key -pubout -out release.pub
	cut -c67- SHA256SUMS | xargs sha256sum >/root/sums
	mv /root/sums SHA256SUMS
	openssl pkeyutl -sign -inkey /root/other.key -rawin -in SHA256SUMS -out SHA256SUMS.sig
done`

// TestRefusals: what cannot work, or must not be trusted, is refused with the reason before anything is changed.
func TestRefusals(t *testing.T) {
	bed := testbed.New(t)
	s := machine(t, bed, "r1", nil, testbed.Systemd())
	booted(t, s)
	shell(t, s, forge)
	if err := s.WriteFile("/root/release.pub", read(t, shared.key), 0o644); err != nil {
		t.Fatal(err)
	}
	before := listing(t, s)
	for _, test := range []struct {
		name, prepare, undo string
		from                string
		args                []string
		want                string
	}{
		{name: "a damaged file", from: "/root/damaged", want: "is damaged: README.md: FAILED"},
		{name: "another's signature", from: "/root/forged", args: []string{"--release-pub", "/root/release.pub"}, want: "is not signed with /root/release.pub"},
		{name: "another architecture", from: "/root/foreign", want: "is for another architecture; this machine needs linux-" + goarch},
		{name: "noexec", prepare: "mount -t tmpfs -o noexec none /usr/local/bin", undo: "umount /usr/local/bin", from: stick,
			want: "/usr/local/bin is on a file system mounted with noexec"},
		{name: "an agent of nothing", from: stick, args: []string{"agent"}, want: "give KEDGE_URL and KEDGE_TOKEN"},
		{name: "a check that fails", from: stick, args: []string{"server", "--node-name", "NOT_A_NAME"}, want: "this machine cannot run Kedge yet"},
		{name: "no key where one is wanted", prepare: "mv /usr/bin/openssl /root/", undo: "mv /root/openssl /usr/bin/", from: stick,
			args: []string{"--release-pub", "/root/release.pub"}, want: "openssl 3 is missing"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.prepare != "" {
				shell(t, s, test.prepare)
				defer shell(t, s, test.undo)
			}
			out, err := tryInstall(t, s, test.from, test.args...)
			if err == nil {
				t.Errorf("accepted: %s", out)
			}
			contains(t, out, test.want)
		})
	}
	contains(t, shell(t, s, "! setpriv --reuid 65534 sh "+stick+"/install.sh 2>&1"), "only root can install")
	if after := listing(t, s); after != before {
		t.Errorf("something was changed")
	}

	t.Run("no service manager", func(t *testing.T) {
		simple := machine(t, bed, "r2", nil)
		out, err := tryInstall(t, simple, stick)
		if err == nil {
			t.Errorf("accepted: %s", out)
		}
		contains(t, out, "neither systemd nor OpenRC")
	})

	t.Run("a token of another cluster", func(t *testing.T) {
		out, err := tryInstall(t, s, stick, "KEDGE_URL=https://"+s.IP()+":6443", "KEDGE_TOKEN=bad.token")
		if err == nil {
			t.Errorf("accepted: %s", out)
		}
		contains(t, out, "the token cannot be used", "the service goes on trying")
	})
}

// TestDownload pipes install.sh into a shell, as with curl; the release comes from a web server.
func TestDownload(t *testing.T) {
	bed := testbed.New(t)
	s := machine(t, bed, "d1", nil, testbed.Systemd())
	booted(t, s)
	dist := t.TempDir()
	name := filepath.Base(shared.first)
	archive := filepath.Join(dist, name+".tar.gz")
	if out, err := run("sh", "-c", `tar -C "$1" -cf - "$2" | gzip -1 >"$3"; cd "$4"; sha256sum "$2.tar.gz" >SHA256SUMS; echo "0000 kedge-v9.0.0+kedge1-linux-other.tar.gz" >>SHA256SUMS`,
		"sh", filepath.Dir(shared.first), name, archive, dist); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(bed.Gateway(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.FileServer(http.Dir(dist))}
	go server.Serve(listener)
	defer server.Close()
	if err := s.WriteFile("/root/release.pub", read(t, shared.key), 0o644); err != nil {
		t.Fatal(err)
	}
	pipe := func(args string) (string, error) {
		script := read(t, filepath.Join(shared.first, "install.sh"))
		return s.ExecInput(cluster.Within(t, 3*minute), strings.NewReader(string(script)), "sh", "-c",
			"KEDGE_DOWNLOAD_URL=http://"+listener.Addr().String()+" KEDGE_RELEASE_PUB=/root/release.pub sh -s - "+args+" 2>&1")
	}
	before := listing(t, s)
	out, err := pipe("--dry-run")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	contains(t, out, "downloading", name+".tar.gz", "signed with /root/release.pub", "nothing was changed")
	if listing(t, s) != before {
		t.Error("a dry run changed something")
	}
	if out, err = pipe("--no-start server --debug"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	contains(t, out, "installed, and not started")
	contains(t, shell(t, s, "systemctl is-enabled kedge; systemctl is-active kedge || true; systemctl cat kedge; kedge version"), "enabled", "inactive", "kedge server --debug", shared.versions[0])
	if out, err := pipe("--version v8.8.8"); err == nil || !strings.Contains(out, "names no archive kedge-v8.8.8-linux-"+goarch) {
		t.Errorf("a version that is not there: %v: %s", err, out)
	}
	if left := shell(t, s, "ls -A /tmp | grep '^tmp\\.' || true"); left != "" {
		t.Errorf("left in /tmp: %s", left)
	}
	if err := os.Truncate(archive, 1<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := pipe(""); err == nil || !strings.Contains(out, "is damaged") {
		t.Errorf("half an archive: %v: %s", err, out)
	}
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
