// SPDX-License-Identifier: Apache-2.0

package deploy

// known is what a server remembers of a file from the last time when its directory and the cluster said the same.
type known struct {
	Revision int64  `json:"revision"`
	Hash     string `json:"sha256"`
}

// inCluster is a record, for decide.
type inCluster struct {
	revision int64
	hash     string
	deleted  bool
}

// action is what a server does about one file so that its directory and the cluster say the same.
type action int

const (
	nothing    action = iota
	remember          // they say the same: note it
	forget            // both have no such file
	push              // the directory's version becomes the cluster's
	pushDelete        // removed here: remove it from the cluster
	write             // the cluster's version becomes the directory's
	remove            // removed elsewhere: remove it here
	asideWrite        // both changed: keep the directory's version under another name and take the cluster's
	asideOnly         // removed elsewhere, changed here: keep it under another name
)

// decide compares a file's checksum in the directory ("": there is none) with the cluster's record and with what this server knew. Whoever
// changed a file since this server last knew it has changed it: the directory, the cluster, or both. When both did, the cluster's version came
// first. Nothing that somebody wrote is lost; nothing that somebody removed comes back from a server that was off meanwhile.
func decide(local string, k *known, c *inCluster) action {
	if c == nil || k != nil && c.revision < k.Revision {
		return behind(local, k, c)
	}
	same := k != nil && k.Revision == c.revision && k.Hash == c.hash // nobody but this server can have changed it
	if c.deleted {
		switch {
		case local == "" && k == nil:
			return nothing
		case local == "":
			return forget
		case k == nil || same:
			return push // a new file that has an old one's name
		case local == k.Hash:
			return remove
		}
		return asideOnly
	}
	switch {
	case local == c.hash && same:
		return nothing
	case local == c.hash:
		return remember
	case local == "" && same:
		return pushDelete
	case local == "":
		return write // never had it, or removed what was changed meanwhile
	case k == nil:
		return asideWrite
	case same:
		return push
	case local == k.Hash:
		return write
	}
	return asideWrite
}

// behind is about a cluster that does not know what this server knew: it was restored from a snapshot, or the record was deleted by hand. The
// file is there, and that is what people see.
func behind(local string, k *known, c *inCluster) action {
	switch {
	case local != "" && c != nil && !c.deleted && local == c.hash:
		return remember
	case local != "":
		return push
	case c != nil && !c.deleted:
		return write
	case k != nil:
		return forget
	}
	return nothing
}
