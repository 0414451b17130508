// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"fmt"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// Health is what a member says of itself and of its cluster.
type Health struct {
	Member
	Leader bool `json:"leader"`
	// HasLeader is false while the members have no majority, or elect.
	HasLeader bool `json:"hasLeader"`
	// Size of the database file in bytes, what of it is in use, and at what size the datastore takes no more writes.
	Size  int64 `json:"size"`
	InUse int64 `json:"inUse"`
	Quota int64 `json:"quota"`
	// Revision of the data; Behind is how many entries of the log the member has not applied yet.
	Revision int64  `json:"revision"`
	Behind   uint64 `json:"behind"`
	// Alarms of the whole cluster, as "NOSPACE of s1".
	Alarms  []string `json:"alarms"`
	Members []Member `json:"members"`
	// Took is how long the member needed for an answer that only a majority can give (a linearizable read).
	Took time.Duration `json:"tookNanoseconds"`
}

// Inspect asks the member behind endpoint (see Endpoint). A member without a majority is not an error: HasLeader says it.
func Inspect(ctx context.Context, endpoint string) (*Health, error) {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: probeTimeout, Logger: zap.NewNop()})
	if err != nil {
		return nil, fmt.Errorf("etcd at %s: %w", endpoint, err)
	}
	defer client.Close()
	status, err := client.Status(ctx, endpoint)
	if err != nil {
		return nil, explain("ask the datastore member for its status", err)
	}
	// What follows is answered from the member's own copy.
	list, err := client.MemberList(ctx, clientv3.WithSerializable())
	if err != nil {
		return nil, explain("list the members", err)
	}
	self := status.Header.MemberId
	h := &Health{
		Leader: status.Leader == self, HasLeader: status.Leader != 0, Size: status.DbSize, InUse: status.DbSizeInUse, Quota: status.DbSizeQuota,
		Revision: status.Header.Revision, Behind: status.RaftIndex - status.RaftAppliedIndex, Members: fromResponse(list.Members), Alarms: []string{},
	}
	names := map[string]string{}
	for _, m := range h.Members {
		names[m.ID] = m.Name
		if m.ID == types.ID(self).String() {
			h.Member = m
		}
	}
	if !h.HasLeader {
		return h, nil
	}
	alarms, err := client.AlarmList(ctx)
	if err != nil {
		return nil, explain("list the alarms", err)
	}
	for _, a := range alarms.Alarms {
		h.Alarms = append(h.Alarms, fmt.Sprintf("%s of %s", a.Alarm, names[types.ID(a.MemberID).String()]))
	}
	start := time.Now()
	if _, err := client.Get(ctx, "\x00", clientv3.WithCountOnly()); err != nil {
		return nil, explain("read from the datastore", err)
	}
	h.Took = time.Since(start)
	return h, nil
}
