// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"time"
)

// use is what a machine used, since it was booted or in a minute.
type use struct {
	cpu             float64 // seconds
	written, device float64 // MB, as counted by process and by the disk
	flushes         float64
}

func (u use) plus(v use) use {
	return use{cpu: u.cpu + v.cpu, written: u.written + v.written, device: u.device + v.device, flushes: u.flushes + v.flushes}
}

func (u use) times(f float64) use {
	return use{cpu: u.cpu * f, written: u.written * f, device: u.device * f, flushes: u.flushes * f}
}

// meter measures what a machine uses, from its making on.
type meter struct {
	h      *host
	device *device
	tracer *tracer // nil when system calls cannot be traced
	begin  time.Time
	before use // without what processes wrote
	// What each process had written, and its processor time, before.
	wrote, ran map[process]float64
}

// newMeter begins to measure.
func newMeter(h *host) (m *meter, err error) {
	m = &meter{h: h}
	if m.device, err = h.device(); err != nil {
		return nil, err
	}
	m.tracer, err = newTracer(h)
	if errors.Is(err, errNoTrace) {
		fmt.Println("fsyncs are not counted:", err)
		m.tracer = nil
	} else if err != nil {
		return nil, fmt.Errorf("trace system calls: %w", err)
	}
	device, flushes, err := m.device.counters()
	if err != nil {
		return nil, errors.Join(err, m.close())
	}
	m.before.device, m.before.flushes = device/1e6, flushes
	if m.wrote, err = h.written(); err != nil {
		return nil, errors.Join(err, m.close())
	}
	if m.ran, err = h.cpuOf(); err != nil {
		return nil, errors.Join(err, m.close())
	}
	m.begin = time.Now()
	if m.before.cpu, err = h.cpuSeconds(); err != nil {
		return nil, errors.Join(err, m.close())
	}
	return m, nil
}

// read completes a reading with what was used since, by the minute.
func (m *meter) read(r *reading) error {
	now, err := m.h.cpuSeconds()
	if err != nil {
		return err
	}
	minute := time.Minute.Seconds() / time.Since(m.begin).Seconds()
	ran, err := m.h.cpuOf()
	if err != nil {
		return err
	}
	if m.tracer != nil {
		calls, err := m.tracer.count()
		if err != nil {
			return err
		}
		r.syncs = map[string]float64{}
		for call, n := range calls {
			r.syncs[call] = float64(n) * minute
		}
	}
	wrote, err := m.h.written()
	if err != nil {
		return err
	}
	device, flushes, err := m.device.counters()
	if err != nil {
		return err
	}
	used := use{cpu: now, written: total(increase(m.wrote, wrote)) / 1e6, device: device / 1e6, flushes: flushes}
	r.use = used.plus(m.before.times(-1)).times(minute)
	r.share(increase(m.ran, ran), minute)
	return nil
}

// increase is what processes added to a count, by name, those that have begun since included.
func increase(before, now map[process]float64) map[string]float64 {
	sum := map[string]float64{}
	for p, n := range now {
		sum[p.name] += n - before[p]
	}
	return sum
}

func total(byName map[string]float64) float64 {
	sum := 0.0
	for _, n := range byName {
		sum += n
	}
	return sum
}

func (m *meter) close() error {
	if m.tracer == nil {
		return nil
	}
	return m.tracer.close()
}
