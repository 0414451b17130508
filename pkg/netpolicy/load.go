// SPDX-License-Identifier: Apache-2.0

package netpolicy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"

	"github.com/google/nftables"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/knftables"
)

// table (family inet) with everything that Kedge does for policies.
const table = "kedge-netpol"

// kernel has the table.
type kernel struct {
	nft    knftables.Interface
	path   string   // of the program
	loaded *ruleset // what the table has; nil: not known
}

func newKernel() (*kernel, error) {
	nft, err := knftables.New(knftables.InetFamily, table)
	if err != nil {
		return nil, fmt.Errorf("network policies cannot be enforced: nftables: %w", err)
	}
	path, err := exec.LookPath("nft")
	return &kernel{nft: nft, path: path}, err
}

// read gives the table as it is; none where there is no table.
func (k *kernel) read(ctx context.Context) (rules *ruleset, comments map[string][]string, err error) {
	if there, err := k.there(); err != nil || !there {
		return nil, nil, err
	}
	text, err := exec.CommandContext(ctx, k.path, "-j", "list", "table", "inet", table).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil, nil, fmt.Errorf("nft list table inet %s: %w: %s", table, err, strings.TrimSpace(string(exit.Stderr)))
	} else if err != nil {
		return nil, nil, err
	}
	return parseTable(text)
}

func (k *kernel) there() (bool, error) {
	conn, err := nftables.New()
	if err != nil {
		return false, err
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == table }), err
}

// intact looks whether the fixed part is still in place, without running a program: others flush the whole rule set. What is in the sets
// is not looked at.
func (k *kernel) intact() (bool, error) {
	if k.loaded == nil {
		return true, nil
	}
	conn, err := nftables.New()
	if err != nil {
		return false, err
	}
	for chain := range k.loaded.base {
		rules, err := conn.GetRules(&nftables.Table{Name: table, Family: nftables.TableFamilyINet}, &nftables.Chain{Name: chain})
		if err != nil || len(rules) != len(k.loaded.base[chain]) {
			return false, err
		}
	}
	return true, nil
}

// load brings the table to want. Usually this is a difference to what it has; when that fails, all of it in one step.
// It gives what the table had before, nil if that is not known.
func (k *kernel) load(ctx context.Context, want *ruleset) (before *ruleset, err error) {
	before, k.loaded = k.loaded, nil
	if before != nil && before.identity() != want.identity() {
		before = nil
	} else if before == nil {
		before, err = k.takeOver(ctx, want)
	}
	if before != nil {
		if err = k.run(ctx, change(k.nft, before, want)); err == nil {
			k.loaded = want
			k.collect(ctx, before)
			return before, nil
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if replaceErr := k.run(ctx, replace(k.nft, want)); replaceErr != nil {
		return nil, fmt.Errorf("load the rules of network policies: %w", errors.Join(replaceErr, err))
	}
	k.loaded = want
	return nil, nil
}

// silence drops for a while what comes as answers to connections. For those that are already in the set the time goes on as it was.
func (k *kernel) silence(ctx context.Context, f family, answers []ends) error {
	tx := k.nft.NewTransaction()
	for _, a := range answers {
		tx.Add(&knftables.Element{Set: f.name(setCut), Key: []string{a.from.String(), fmt.Sprint(a.fromPort), a.to.String(), fmt.Sprint(a.toPort)}})
	}
	return k.run(ctx, tx)
}

// collect removes what want does not need any more, in a transaction of its own: some kernels still count the references of the elements
// that the one before deleted.
func (k *kernel) collect(ctx context.Context, obsolete *ruleset) {
	if err := k.run(ctx, remove(k.nft, obsolete, k.loaded)); err != nil {
		k.loaded = nil // harmless, but it has to be known what there is
	}
}

func (k *kernel) run(ctx context.Context, tx *knftables.Transaction) error {
	if tx.NumOperations() == 0 {
		return nil
	}
	return k.nft.Run(ctx, tx)
}

// takeOver reads what another process has left. Nothing is there, or all has to be as this one would have made it.
func (k *kernel) takeOver(ctx context.Context, want *ruleset) (*ruleset, error) {
	have, comments, err := k.read(ctx)
	if err != nil {
		return nil, err
	}
	if have == nil {
		return nil, errors.New("there is no table yet")
	}
	for chain, rules := range want.base {
		if len(comments[chain]) != len(rules) || comments[chain][0] != want.identity() {
			return nil, fmt.Errorf("chain %s: %w", chain, errForeign)
		}
	}
	for name, s := range have.sets {
		if w, ok := want.sets[name]; ok && (w.typ != s.typ || w.isMap != s.isMap || w.keep != s.keep) {
			return nil, fmt.Errorf("set %s: %w", name, errForeign)
		}
	}
	for name, rules := range have.chains {
		if d, _ := directionOf(name); chainName(d, rules) != name {
			return nil, fmt.Errorf("chain %s: %w", name, errForeign)
		}
	}
	have.base = want.base
	return have, nil
}

// replace makes the whole table anew, in one step.
func replace(nft knftables.Interface, want *ruleset) *knftables.Transaction {
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	tx.Add(&knftables.Table{Comment: ptr.To("network policies")})
	write(tx, &ruleset{}, want)
	for _, chain := range slices.Sorted(maps.Keys(want.base)) {
		tx.Add(&knftables.Chain{
			Name:     chain,
			Type:     ptr.To(knftables.FilterType),
			Hook:     ptr.To(knftables.BaseChainHook(chain)),
			Priority: ptr.To(knftables.BaseChainPriority(priority(chain))),
		})
		for i, r := range want.base[chain] {
			comment := ptr.To(r.comment)
			if i == 0 {
				comment = ptr.To(want.identity())
			} else if r.comment == "" {
				comment = nil
			}
			tx.Add(&knftables.Rule{Chain: chain, Rule: r.text, Comment: comment})
		}
	}
	return tx
}

// change makes what want has and have has not, and takes elements out.
func change(nft knftables.Interface, have, want *ruleset) *knftables.Transaction {
	tx := nft.NewTransaction()
	write(tx, have, want)
	return tx
}

func write(tx *knftables.Transaction, have, want *ruleset) {
	names := slices.Sorted(maps.Keys(want.sets))
	for _, name := range names {
		if _, ok := have.sets[name]; ok {
			continue
		}
		switch s := want.sets[name]; {
		case s.isMap:
			tx.Add(&knftables.Map{Name: name, Type: s.typ + " : verdict"})
		case s.keep > 0:
			tx.Add(&knftables.Set{Name: name, Type: s.typ, Flags: []knftables.SetFlag{knftables.TimeoutFlag}, Timeout: &s.keep})
		default:
			tx.Add(&knftables.Set{Name: name, Type: s.typ})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want.chains)) {
		if _, ok := have.chains[name]; ok {
			continue
		}
		d, _ := directionOf(name)
		tx.Add(&knftables.Chain{Name: name})
		for _, r := range want.chains[name] {
			add := &knftables.Rule{Chain: name, Rule: r.text(d)}
			if r.comment != "" {
				add.Comment = &r.comment
			}
			tx.Add(add)
		}
	}
	for _, name := range names {
		writeElements(tx, name, have.sets[name], want.sets[name])
	}
}

func writeElements(tx *knftables.Transaction, name string, have, want set) {
	for _, key := range slices.Sorted(maps.Keys(have.elems)) {
		if value, ok := want.elems[key]; !ok || value != have.elems[key] {
			tx.Delete(element(name, key, have))
		}
	}
	for _, key := range slices.Sorted(maps.Keys(want.elems)) {
		if value, ok := have.elems[key]; !ok || value != want.elems[key] {
			tx.Add(element(name, key, want))
		}
	}
}

func element(name, key string, s set) *knftables.Element {
	e := &knftables.Element{Key: strings.Split(key, " . ")}
	if s.isMap {
		e.Map, e.Value = name, []string{"jump " + s.elems[key]}
	} else {
		e.Set = name
	}
	return e
}

// remove deletes the chains and sets that have has and want has not.
func remove(nft knftables.Interface, have, want *ruleset) *knftables.Transaction {
	tx := nft.NewTransaction()
	for _, name := range slices.Sorted(maps.Keys(have.chains)) {
		if _, ok := want.chains[name]; !ok {
			tx.Flush(&knftables.Chain{Name: name})
			tx.Delete(&knftables.Chain{Name: name})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have.sets)) {
		if s, ok := want.sets[name]; !ok {
			if s.isMap = have.sets[name].isMap; s.isMap {
				tx.Delete(&knftables.Map{Name: name})
			} else {
				tx.Delete(&knftables.Set{Name: name})
			}
		}
	}
	return tx
}

// Cleanup removes the rules: for uninstalling and for switching policies off. What is not there is no error.
func Cleanup(ctx context.Context) error {
	nft, err := knftables.New(knftables.InetFamily, table)
	if err != nil {
		return nil // without nft there are no rules
	}
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	if err := nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("remove nftables table inet %s: %w", table, err)
	}
	return nil
}
