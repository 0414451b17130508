// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const lookupTimeout = 2 * time.Second

// lookups asks a DNS server for the address of a name, by several workers at once.
func lookups(ctx context.Context, q url.Values) (Result, error) {
	d, err := span(q)
	if err != nil {
		return Result{}, err
	}
	workers, err := strconv.Atoi(q.Get("workers"))
	if err != nil {
		return Result{}, err
	}
	m := new(dns.Msg).SetQuestion(dns.Fqdn(q.Get("name")), dns.TypeA)
	question, err := m.Pack()
	if err != nil {
		return Result{}, err
	}
	var (
		all     sync.WaitGroup
		mu      sync.Mutex
		took    []time.Duration
		failed  int
		failure error
	)
	begin := time.Now()
	for range workers {
		all.Go(func() {
			var mine []time.Duration
			for time.Since(begin) < d && ctx.Err() == nil {
				start := time.Now()
				if err := lookup(q.Get("to"), question); err != nil {
					mu.Lock()
					failed++
					failure = err
					mu.Unlock()
					continue
				}
				mine = append(mine, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			took = append(took, mine...)
		})
	}
	all.Wait()
	res := summary(took, time.Since(begin))
	res.Failed = failed
	if failure != nil {
		res.Failure = failure.Error()
	}
	return res, nil
}

// lookup sends a question and waits for an answer that has an address. It is not parsed, to use little of the processor that the server
// needs, too.
func lookup(to string, question []byte) error {
	c, err := net.Dial("udp", to)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(lookupTimeout)); err != nil {
		return err
	}
	var b [1500]byte
	n := copy(b[:], question)
	id := uint16(rand.Uint32())
	binary.BigEndian.PutUint16(b[:], id)
	if _, err := c.Write(b[:n]); err != nil {
		return err
	}
	if n, err = c.Read(b[:]); err != nil {
		return err
	}
	// RFC 1035, section 4.1.1: ID, flags with the response code in the last four bits, and the numbers of questions and answers.
	if n < 12 || binary.BigEndian.Uint16(b[:]) != id {
		return errors.New("not the answer to the question")
	}
	if rcode, answers := int(b[3]&0xf), binary.BigEndian.Uint16(b[6:]); rcode != dns.RcodeSuccess || answers == 0 {
		return fmt.Errorf("%s with %d records", dns.RcodeToString[rcode], answers)
	}
	return nil
}
