// SPDX-License-Identifier: Apache-2.0

package token

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/kedge-io/kedge/pkg/join"
)

// inspect prints what a token says of itself and, unless openErr says why not, what the cluster knows of it. It fails when no
// machine could join this cluster with the token.
func inspect(ctx context.Context, out io.Writer, t join.Token, cl *cluster, openErr error) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintf(w, "ID\t%s\n", t.ID)
	kind := "made by `kedge token create`"
	switch {
	case t.Derived:
		kind = "a text of your own; ID and secret are derived from it"
	case t.CAHash == "":
		kind = "a bootstrap token without a CA hash"
	}
	fmt.Fprintf(w, "kind\t%s\n", kind)
	hash := "none: joiners recognise the cluster by its knowledge of the token"
	if t.CAHash != "" {
		hash = "sha256:" + t.CAHash
	}
	fmt.Fprintf(w, "CA hash\t%s\n", hash)
	var verdict error
	if openErr != nil {
		fmt.Fprintf(w, "cluster\tnot asked: %v\n", openErr)
	} else {
		verdict = inspectIn(ctx, w, t, cl)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return verdict
}

// inspectIn asks the cluster.
func inspectIn(ctx context.Context, w io.Writer, t join.Token, cl *cluster) error {
	if t.CAHash != "" && t.CAHash != cl.caHash {
		fmt.Fprintf(w, "cluster\tanother one: the CA hash here is sha256:%s\n", cl.caHash)
		return fmt.Errorf("the token is for another cluster than %s", cl.url)
	}
	if t.CAHash != "" {
		fmt.Fprintf(w, "cluster\tthis one (%s)\n", cl.url)
	}
	_, i, err := cl.get(ctx, t.ID)
	if errors.Is(err, errNoAnswer) {
		fmt.Fprintf(w, "validity\tunknown: %v\n", err)
		return nil
	}
	if err != nil {
		return err
	}
	e := newEntry(*i)
	fmt.Fprintf(w, "role\t%s\nexpires in\t%s\n", e.Role, remaining(e.Expires, time.Now()))
	if e.Description != "" {
		fmt.Fprintf(w, "description\t%s\n", e.Description)
	}
	switch {
	case i.Token.Secret != t.Secret:
		return fmt.Errorf("the cluster has a token %s, but with another secret: this one was mistyped, or is an old one", t.ID)
	case e.Expires != nil && !e.Expires.After(time.Now()):
		return fmt.Errorf("token %s has expired; make another with `kedge token create`", t.ID)
	case i.Role == "":
		return fmt.Errorf("token %s is not for joining machines to Kedge; something else made it", t.ID)
	}
	return nil
}
