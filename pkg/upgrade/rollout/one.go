// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"

	"github.com/kedge-io/kedge/pkg/agent"
	"github.com/kedge-io/kedge/pkg/upgrade"
)

// One upgrades one machine, or takes it back to its previous version when there is no source.
func One(ctx context.Context, t *Target, source *Source, req agent.UpgradeRequest, say func(string)) (*upgrade.Result, error) {
	if source != nil {
		check := req
		check.Check, check.Info, check.Signer = true, source.Info, source.Signer
		if _, err := t.Ask(ctx, check, say); err != nil || req.Check {
			return nil, err
		}
		src, size, err := source.Open()
		if err != nil {
			return nil, err
		}
		defer src.Close()
		rel, err := t.Send(ctx, src, size, nil)
		if err != nil {
			return nil, err
		}
		req.SHA256 = rel.SHA256
	}
	id, err := t.Ask(ctx, req, say)
	if err != nil || req.Check {
		return nil, err
	}
	return t.Watch(ctx, id, req.Timeout, say)
}
