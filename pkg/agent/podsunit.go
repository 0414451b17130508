// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"

	"github.com/kedge-io/kedge/pkg/service"
)

// execCommand is one of systemd's Exec… properties on the bus.
type execCommand struct {
	Path   string
	Args   []string
	Ignore bool // its failure
}

// keepPodsUnit makes service.PodsUnit where systemd runs Kedge as a service.
func (m *Machine) keepPodsUnit(ctx context.Context) error {
	if os.Getenv("NOTIFY_SOCKET") == "" || os.Getenv("INVOCATION_ID") == "" || !m.cfg.HasNode() {
		return nil
	}
	if err := m.makePodsUnit(ctx); err != nil && ctx.Err() == nil {
		m.log.Warn("pods that run when Kedge was stopped before the machine get no time to end", "error", err)
	}
	return nil
}

func (m *Machine) makePodsUnit(ctx context.Context) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	program = strings.TrimSuffix(program, ".next") // under trial after an upgrade: it will be called as the one before
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	conn, err := systemd.NewSystemdConnectionContext(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	timeout := m.cfg.ShutdownGracePeriod + m.cfg.ShutdownGraceCritical + time.Minute
	stop := []execCommand{{program, []string{program, "stop", "--pods", "--alone", "--run-dir", m.cfg.RunDir}, true}}
	property := func(name string, value any) systemd.Property {
		return systemd.Property{Name: name, Value: dbus.MakeVariant(value)}
	}
	// Ordered as Kedge is among the others, and before it: so it stops after it.
	_, err = conn.StartTransientUnitContext(ctx, service.PodsUnit, "fail", []systemd.Property{
		property("Description", "Ends Kedge's pods when the machine stops"),
		property("Type", "oneshot"),
		property("RemainAfterExit", true),
		property("ExecStop", stop),
		property("TimeoutStopUSec", uint64(timeout.Microseconds())),
		property("Before", []string{"kedge.service"}),
		property("After", []string{"network-online.target", "local-fs.target", "remote-fs.target", "dbus.service"}),
	}, nil)
	var known dbus.Error
	if errors.As(err, &known) && known.Name == "org.freedesktop.systemd1.UnitExists" {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", service.PodsUnit, err)
	}
	return nil
}
