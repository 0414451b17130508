// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"time"
)

// The first byte of a connection says what the client wants.
const (
	wantSink = 's' // read everything, and answer with the number of bytes once the client has no more
	wantEcho = 'e' // answer each message with itself
)

const messageSize = 64

func accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_ = serve(c) // the client tells
		}()
	}
}

func serve(c net.Conn) error {
	var kind [1]byte
	if _, err := io.ReadFull(c, kind[:]); err != nil {
		return err
	}
	if kind[0] == wantSink {
		n, err := drain(c)
		if err != nil {
			return err
		}
		return binary.Write(c, binary.BigEndian, n)
	}
	var b [messageSize]byte
	for {
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return err
		}
		if _, err := c.Write(b[:]); err != nil {
			return err
		}
	}
}

const blockSize = 256 << 10

// drain reads to the end, through memory as a program does.
func drain(c net.Conn) (n uint64, err error) {
	b := make([]byte, blockSize)
	for {
		k, err := c.Read(b)
		n += uint64(k)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// dial opens a connection that can take no longer than a time as a whole.
func dial(ctx context.Context, to string, kind byte, limit time.Duration) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "tcp", to)
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		return nil, err
	}
	_, err = c.Write([]byte{kind})
	return c.(*net.TCPConn), err
}

func throughput(ctx context.Context, q url.Values) (Result, error) {
	d, err := span(q)
	if err != nil {
		return Result{}, err
	}
	c, err := dial(ctx, q.Get("to"), wantSink, d+10*time.Second)
	if err != nil {
		return Result{}, err
	}
	defer c.Close()
	block := make([]byte, blockSize)
	begin := time.Now()
	for time.Since(begin) < d {
		if _, err := c.Write(block); err != nil {
			return Result{}, err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return Result{}, err
	}
	var n uint64
	if err := binary.Read(c, binary.BigEndian, &n); err != nil {
		return Result{}, err
	}
	return Result{PerSecond: float64(n) / time.Since(begin).Seconds(), Done: 1}, nil
}

func requests(ctx context.Context, q url.Values) (Result, error) {
	d, err := span(q)
	if err != nil {
		return Result{}, err
	}
	c, err := dial(ctx, q.Get("to"), wantEcho, d+10*time.Second)
	if err != nil {
		return Result{}, err
	}
	defer c.Close()
	return repeat(d, func() error { return exchange(c) })
}

func exchange(c net.Conn) error {
	var b [messageSize]byte
	if _, err := c.Write(b[:]); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b[:])
	return err
}

func connections(ctx context.Context, q url.Values) (Result, error) {
	d, err := span(q)
	if err != nil {
		return Result{}, err
	}
	return repeat(d, func() error { return once(ctx, q.Get("to"), 5*time.Second) })
}

// once makes a connection for one request.
func once(ctx context.Context, to string, limit time.Duration) error {
	c, err := dial(ctx, to, wantEcho, limit)
	if err != nil {
		return err
	}
	defer c.Close()
	// Without it each connection would keep its port for a minute, and there are 28,000 of them.
	if err := c.SetLinger(0); err != nil {
		return err
	}
	return exchange(c)
}

// repeat does something again and again. A failure ends it.
func repeat(d time.Duration, do func() error) (Result, error) {
	var took []time.Duration
	begin := time.Now()
	for time.Since(begin) < d {
		start := time.Now()
		if err := do(); err != nil {
			return Result{}, fmt.Errorf("after %d times: %w", len(took), err)
		}
		took = append(took, time.Since(start))
	}
	return summary(took, time.Since(begin)), nil
}

func summary(took []time.Duration, all time.Duration) Result {
	if len(took) == 0 {
		return Result{}
	}
	slices.Sort(took)
	return Result{Done: len(took), PerSecond: float64(len(took)) / all.Seconds(), P50: took[len(took)/2], P99: took[len(took)*99/100]}
}
