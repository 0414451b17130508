// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kedge-io/kedge/tests/cluster"
	"github.com/kedge-io/kedge/tests/testbed"
)

// web serves the releases by their names, and below other directories what goes wrong with downloads. It gives the URL.
func (r *releases) web(t *testing.T, bed *testbed.Bed) string {
	t.Helper()
	l, err := net.Listen("tcp", bed.Gateway()+":0")
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		how, name := filepath.Split(req.URL.Path)
		f, err := os.Open(filepath.Join(r.dir, name))
		if err != nil {
			http.NotFound(w, req)
			return
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		half := io.LimitReader(f, st.Size()/2)
		switch how {
		case "/":
			http.ServeContent(w, req, name, st.ModTime(), f)
		case "/elsewhere/": // as GitHub does
			http.Redirect(w, req, "/"+name, http.StatusFound)
		case "/page/":
			_, _ = io.WriteString(w, "<html>Please log in to this network</html>")
		case "/half/":
			_, _ = io.Copy(w, half)
		case "/goes-away/":
			w.Header().Set("Content-Length", strconv.FormatInt(st.Size(), 10))
			_, _ = io.Copy(w, half)
			panic(http.ErrAbortHandler)
		case "/holds/": // until somebody gives up
			w.Header().Set("Content-Length", strconv.FormatInt(st.Size(), 10))
			_, _ = io.Copy(w, half)
			_ = http.NewResponseController(w).Flush()
			<-req.Context().Done()
		default:
			http.NotFound(w, req)
		}
	}))
	srv.Listener = l
	srv.Start()
	t.Cleanup(srv.Close)
	return srv.URL
}

// testDownloads goes through what may be wrong with a URL. Nothing comes of it. It gives one that is right.
func testDownloads(t *testing.T, r *releases, s *cluster.Server) string {
	t.Helper()
	url, name := r.web(t, s.Bed()), filepath.Base(r.good)
	for from, want := range map[string]string{
		url + "/none/" + name:               `cannot be downloaded: the server says "404 Not Found"`,
		url + "/page/" + name:               "not a complete release archive",
		url + "/half/" + name:               "not a complete release archive",
		url + "/goes-away/" + name:          "unexpected EOF; the same command begins it anew",
		url + "/" + filepath.Base(r.forged): "not trusted",
		"http://" + s.IP() + ":1/" + name:   "connection refused; the same command begins it anew",
		"http://nowhere.invalid/" + name:    "nowhere.invalid",
		"file:///media/stick/" + name:       "is not the URL of a release",
	} {
		if out, err := upgrade(t, s, "--from", from); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: %v; want %q in %s", from, err, want, out)
		}
	}
	// The power of the terminal goes in the middle of it.
	p, err := s.Spawn(cluster.Within(t, minute), "/var/log/download.log", cluster.Program, "upgrade", "--from", url+"/holds/"+name)
	if err != nil {
		t.Fatal(err)
	}
	cluster.Eventually(t, "half of the download", func(ctx context.Context) error {
		out, err := s.Shell(ctx, "cat /var/log/download.log")
		if err == nil && !strings.Contains(out, "MiB") {
			err = errors.New(out)
		}
		return err
	})
	if err := p.Signal(cluster.Within(t, minute), "KILL"); err != nil {
		t.Fatal(err)
	}
	if out, err := s.Shell(t.Context(), "find "+cluster.DataDir+" /tmp /var/tmp -maxdepth 1 -name '.upgrade-*'; ls /usr/local/bin"); err != nil || out != "kedge\n" {
		t.Errorf("left of downloads: %q, %v", out, err)
	}
	if st := runs(t, s, r.old); len(st.History) != 0 {
		t.Errorf("something was done: %+v", st.History)
	}
	return url + "/elsewhere/" + name
}
