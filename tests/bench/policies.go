// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// enforceBenchmark is in pkg/netpolicy: 200 policies and 500 pods of a node, with the kernel's real packet filter.
const enforceBenchmark = "BenchmarkEnforce"

// policyFigures: the benchmark calls its values by their units.
func policyFigures() []figure {
	const name = "200 policies, 500 pods: "
	return []figure{
		{"ms/all", name + "all policies are new, until enforced", "ms"},
		{"cpu-ms/all", name + "all policies are new, CPU until then", "ms"},
		{"ms/policy", name + "one more policy, until enforced", "ms"},
		{"cpu-ms/policy", name + "one more policy, CPU until then", "ms"},
		{"ms/pod", name + "one more pod, until enforced", "ms"},
		{"cpu-ms/pod", name + "one more pod, CPU until then", "ms"},
	}
}

// policies runs the benchmark of Kedge's NetworkPolicy. So many pods are more than a kubelet takes on such a machine, and the stock
// components enforce no policy, so there is nothing beside it.
func policies(ctx context.Context, o options, rec *recorder) error {
	program, err := filepath.Abs(o.netpolicy)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, "-test.run", "^$", "-test.bench", "^"+enforceBenchmark+"$", "-test.benchtime", "1x")
	cmd.Dir = "pkg/netpolicy"
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", enforceBenchmark, err, out)
	}
	values, err := parseBenchmark(string(out))
	if err != nil {
		return err
	}
	for _, f := range policyFigures() {
		v, ok := values[f.name]
		if !ok {
			return fmt.Errorf("%s reports no %s: %s", enforceBenchmark, f.name, out)
		}
		rec.add(f.name, v)
	}
	fmt.Printf("%-5s run %d: %s\n", rec.side, rec.run, rec.line())
	return nil
}

// parseBenchmark reads the line of a Go benchmark: a name, the number of times, and values each with its unit.
func parseBenchmark(out string) (map[string]float64, error) {
	line := regexp.MustCompile(`(?m)^` + enforceBenchmark + `\S*\s+\d+\s+(.*)$`).FindStringSubmatch(out)
	if line == nil {
		return nil, errors.New("there is no " + enforceBenchmark + ": " + strings.TrimSpace(out))
	}
	fields := strings.Fields(line[1])
	values := map[string]float64{}
	for ; len(fields) >= 2; fields = fields[2:] {
		v, err := strconv.ParseFloat(fields[0], 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", line[0], err)
		}
		values[fields[1]] = v
	}
	return values, nil
}
