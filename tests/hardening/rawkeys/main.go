// SPDX-License-Identifier: Apache-2.0

// Rawkeys prints what is behind the API: the keys under a prefix in the etcd at a unix socket, each with the beginning of its value.
//
//	rawkeys /run/kedge/etcd.sock /registry/secrets/
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 3 {
		return fmt.Errorf("usage: %s SOCKET PREFIX", os.Args[0])
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"unix://" + os.Args[1]}, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	resp, err := client.Get(ctx, os.Args[2], clientv3.WithPrefix())
	if err != nil {
		return err
	}
	for _, kv := range resp.Kvs {
		fmt.Printf("%s %q\n", kv.Key, kv.Value[:min(len(kv.Value), 40)])
	}
	return nil
}
