// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/kedge-io/kedge/pkg/check"
	"github.com/kedge-io/kedge/pkg/doctor"
	"github.com/kedge-io/kedge/pkg/version"
)

// queryDoctor is what a node finds out about itself and the ways to others; the body is a doctor.Question.
const queryDoctor = "doctor"

// examineTimeout is far above what the probes need.
const examineTimeout = time.Minute

// Examine has the Kedge of this machine (node empty) or of another node answer a question of the doctor.
func Examine(ctx context.Context, runDir, kubeconfig, node string, q doctor.Question) (*doctor.NodeReport, error) {
	ctx, cancel := context.WithTimeout(ctx, examineTimeout)
	defer cancel()
	text, err := json.Marshal(q)
	if err != nil {
		return nil, err
	}
	var body io.ReadCloser
	if node == "" {
		body, err = ask(ctx, runDir, http.MethodPost, "/"+queryDoctor, bytes.NewReader(text))
	} else {
		body, err = Ask(ctx, kubeconfig, node, http.MethodPost, queryDoctor, nil, bytes.NewReader(text))
	}
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var report doctor.NodeReport
	if err := json.NewDecoder(body).Decode(&report); err != nil {
		return nil, fmt.Errorf("its answer: %w (a Kedge of another version?)", err)
	}
	return &report, nil
}

func (m *Machine) serveDoctor(w http.ResponseWriter, r *http.Request) {
	var q doctor.Question
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&q); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	report := doctor.NodeReport{Node: m.cfg.NodeName, Role: string(m.cfg.Role), Version: version.Version, Started: m.started}
	ctx, cancel := context.WithTimeout(r.Context(), examineTimeout)
	defer cancel()
	if q.Listen != nil {
		if err := doctor.ListenAndSend(ctx, *q.Listen, &report); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		m.answer(w, report)
		return
	}
	st := m.status()
	report.Processes, report.Certificates = st.Processes, st.Certificates
	if m.Datastore != nil {
		var err error
		if report.Datastore, err = m.Datastore(ctx); err != nil {
			report.DatastoreError = err.Error()
		}
	}
	doctor.Examine(ctx, q, m.cfg.NodeIP, &report)
	// After the ways: what measures the disk must not slow them down.
	o := m.Preflight()
	o.ExpectRunning = true
	report.Preflight = check.Run(ctx, o)
	report.Time = time.Now()
	m.answer(w, report)
}
