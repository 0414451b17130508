// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

// TestCompletion lets bash read its script, define the functions and complete with them.
func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		var out bytes.Buffer
		if err := completion(&out, shell); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), "alias k=kubectl") || !strings.Contains(out.String(), "__complete") {
			t.Errorf("%s: kubectl or its alias is missing", shell)
		}
		if shell != "bash" {
			continue
		}
		cmd := exec.Command("bash", "-c", "source /dev/stdin && complete -p kedge && complete -p k && complete -p kubectl")
		cmd.Stdin = &out
		got, err := cmd.CombinedOutput()
		if err != nil || strings.Count(string(got), "complete ") != 3 {
			t.Errorf("bash: %v\n%s", err, got)
		}
	}
	if err := completion(&bytes.Buffer{}, "tcsh"); err == nil || !strings.Contains(err.Error(), "bash|zsh|fish") {
		t.Errorf("got %v", err)
	}
}
