// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"crypto/sha256"
	"time"
)

// admitted remembers which key was let in under a name: until its Node appears, nothing else tells that the name is taken, and
// machines with one image have one host name and start at the same moment.
type admitted map[kind]map[string]admission

type admission struct {
	key     [sha256.Size]byte
	request string // the signing request's name
	at      time.Time
	sign    string // of life that the name's Node had shown then; unknownSign if an earlier leader let it in
}

const unknownSign = "?"

// hold is how long a name belongs to the key that was let in, without a sign of life. It is time enough to start a kubelet.
const hold = 2 * time.Minute

func (a admission) over() bool { return time.Since(a.at).Abs() > hold }

func (a admitted) add(r *request, requestName string, at time.Time, sign string) {
	names := a[r.kind]
	if names == nil {
		names = map[string]admission{}
		a[r.kind] = names
	}
	if at.After(names[r.name].at) {
		names[r.name] = admission{r.key, requestName, at, sign}
	}
	for name, other := range names {
		if other.over() {
			delete(names, name)
		}
	}
}

// before returns the admission that stands against r: another key's under this name, while its request is there (`kedge node remove`
// removes that) and its machine has not shown up: then its signs of life, of which the last is sign, decide. A new server asks twice, as a server and then for its kubelet, with different keys: these two do not stand against
// each other, but a server's admission does against an agent's.
func (a admitted) before(r *request, sign string, exists func(requestName string) bool) (admission, bool) {
	if own, ok := a[r.kind][r.name]; ok && own.key == r.key {
		return admission{}, false // the same machine, once more
	}
	for k, names := range a {
		other, ok := names[r.name]
		if !ok || other.over() || !exists(other.request) || other.sign != unknownSign && other.sign != sign {
			continue
		}
		if k == serverClient && r.kind == nodeClient && r.server {
			continue
		}
		return other, true
	}
	return admission{}, false
}
