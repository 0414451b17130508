// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/kedge-io/kedge/tests/image"
	"github.com/kedge-io/kedge/tests/testbed"
)

// Binary is the program under test: $KEDGE_BIN, or bin/kedge of the module.
func Binary() (string, error) {
	if bin := os.Getenv("KEDGE_BIN"); bin != "" {
		return filepath.Abs(bin)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == "/" {
			return "", errors.New("not inside the module: set KEDGE_BIN to the program under test")
		}
	}
	bin := filepath.Join(dir, "bin", "kedge")
	if _, err := os.Stat(bin); err != nil {
		return "", fmt.Errorf("%w: run make build first", err)
	}
	return bin, nil
}

// Build makes a program of Go, a package of this module or of one it depends on, that runs in machines and in containers.
func Build(ctx context.Context, pkg string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "program-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "program")
	cmd := exec.CommandContext(ctx, "go", "build", "-ldflags", "-s -w", "-o", program, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build %s: %w: %s", pkg, err, out)
	}
	return os.ReadFile(program)
}

// Images makes the archives of the images that tests use, busybox and the test server, in dir.
func Images(ctx context.Context, bed *testbed.Bed, dir string) ([]string, error) {
	root, err := bed.Template()
	if err != nil {
		return nil, err
	}
	files := []string{filepath.Join(dir, "busybox.tar"), filepath.Join(dir, "server.tar")}
	return files, errors.Join(image.Busybox(ctx, files[0], image.BusyboxName, root), image.Server(ctx, files[1], image.ServerName))
}
