// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// A record is what the cluster knows of a file: one Secret, as there may be passwords in a manifest and Secrets are encrypted on disk.
const (
	recordType      = "kedge.io/manifest"
	recordPrefix    = "kedge-manifest-"
	recordNamespace = metav1.NamespaceSystem

	annotationFile     = "kedge.io/file"
	annotationRevision = "kedge.io/revision"
	annotationHash     = "kedge.io/sha256"
	annotationBy       = "kedge.io/changed-by"
	annotationAt       = "kedge.io/changed-at"
	annotationDeleted  = "kedge.io/deleted"

	keyContent   = "content.gz"
	keyInventory = "inventory.json"
	keyStatus    = "status.json"
)

// Limits of a file, in bytes: before it is read, and compressed, as a Secret has room for 1 MiB.
const (
	maxFile    = 16 << 20
	maxContent = 900 << 10
)

// record is a Secret that was taken apart. Inventory and status belong to the leader, the rest to whoever changes the file.
type record struct {
	file     string
	revision int64 // counts the file's changes, from 1
	hash     string
	deleted  bool
	by       string // the node whose file it was
	at       time.Time

	secret *corev1.Secret // read only
}

// recordName is the name of a file's Secret: readable where the file's name allows it.
func recordName(file string) string {
	if name := recordPrefix + file; len(validation.IsDNS1123Subdomain(name)) == 0 {
		return name
	}
	clean := regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(file), "-")
	sum := sha256.Sum256([]byte(file))
	return recordPrefix + strings.Trim(clean[:min(len(clean), 100)], "-") + "-" + hex.EncodeToString(sum[:4])
}

// isManifest says whether a file in the directory is one of those that are applied. Names come from other servers, too: none leads elsewhere.
func isManifest(name string) bool {
	return name == filepath.Base(name) && name[0] != '.' && len(name) <= 250 && !strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == '/' }) &&
		slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name))
}

func hashOf(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// parseRecord refuses what Kedge did not write.
func parseRecord(s *corev1.Secret) (record, error) {
	a := s.Annotations
	r := record{file: a[annotationFile], hash: a[annotationHash], deleted: a[annotationDeleted] == "true", by: a[annotationBy], secret: s}
	fail := func(what string) (record, error) {
		return r, fmt.Errorf("the record of a manifest, Secret %s/%s, %s; it is left out: delete it, and write the file again", s.Namespace, s.Name, what)
	}
	if s.Type != recordType || r.file == "" || !isManifest(r.file) || recordName(r.file) != s.Name {
		return fail(fmt.Sprintf("has the type %s and another name than its file %q has", s.Type, r.file))
	}
	var err error
	if r.revision, err = strconv.ParseInt(a[annotationRevision], 10, 64); err != nil || r.revision < 1 {
		return fail(fmt.Sprintf("has the revision %q", a[annotationRevision]))
	}
	r.at, _ = time.Parse(time.RFC3339, a[annotationAt]) // for people only
	if !r.deleted && len(r.hash) != 2*sha256.Size {
		return fail(fmt.Sprintf("has the checksum %q", r.hash))
	}
	return r, nil
}

// content of the file.
func (r record) content() ([]byte, error) {
	if r.deleted {
		return nil, nil
	}
	z, err := gzip.NewReader(bytes.NewReader(r.secret.Data[keyContent]))
	if err != nil {
		return nil, fmt.Errorf("content of %s in the cluster: %w", r.file, err)
	}
	b, err := io.ReadAll(io.LimitReader(z, maxFile+1))
	if err == nil && (len(b) > maxFile || hashOf(b) != r.hash) {
		err = errors.New("it does not fit its checksum")
	}
	if err != nil {
		return nil, fmt.Errorf("content of %s in the cluster: %w", r.file, err)
	}
	return b, nil
}

// version is a new state of a file that is brought into its record.
type version struct {
	file     string
	content  []byte // nil: the file was removed
	revision int64
	by       string
	at       time.Time
}

// put writes a version into a Secret, which may be new. What belongs to the leader stays.
func (v version) put(s *corev1.Secret) error {
	s.Name, s.Namespace, s.Type = recordName(v.file), recordNamespace, recordType
	if s.Annotations == nil {
		s.Annotations = map[string]string{}
	}
	if s.Data == nil {
		s.Data = map[string][]byte{}
	}
	s.Annotations[annotationFile] = v.file
	s.Annotations[annotationRevision] = strconv.FormatInt(v.revision, 10)
	s.Annotations[annotationBy] = v.by
	s.Annotations[annotationAt] = v.at.UTC().Format(time.RFC3339)
	if v.content == nil {
		s.Annotations[annotationDeleted] = "true"
		delete(s.Annotations, annotationHash)
		delete(s.Data, keyContent)
		return nil
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(v.content); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	if b.Len() > maxContent {
		return fmt.Errorf("it has %d KiB when compressed, and the cluster has room for %d in one file: split it up", b.Len()>>10, maxContent>>10)
	}
	delete(s.Annotations, annotationDeleted)
	s.Annotations[annotationHash] = hashOf(v.content)
	s.Data[keyContent] = b.Bytes()
	return nil
}

// reference is an object that a file has or had.
type reference struct {
	Group     string `json:"group,omitempty"`
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
}

func (r reference) String() string {
	s := r.Kind
	if r.Group != "" {
		s += "." + r.Group
	}
	if r.Namespace != "" {
		return s + " " + r.Namespace + "/" + r.Name
	}
	return s + " " + r.Name
}

// inventory are the objects that may have to be deleted when the file has them no more.
func (r record) inventory() ([]reference, error) {
	text := r.secret.Data[keyInventory]
	if len(text) == 0 {
		return nil, nil
	}
	var list []reference
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("the list of the objects of %s in Secret %s/%s: %w", r.file, r.secret.Namespace, r.secret.Name, err)
	}
	return list, nil
}

// State is how far the cluster is with a file.
type State string

// The states of a file.
const (
	Pending State = "pending" // not looked at yet
	Applied State = "applied"
	Failed  State = "failed"  // something in it has an error; the rest is applied
	Waiting State = "waiting" // for a kind of objects that the cluster does not have yet
	Removed State = "removed" // the file and its objects are gone
)

// Problem is something in a file that could not be applied, or deleted.
type Problem struct {
	Where  string `json:"where,omitempty"`  // in the file
	Object string `json:"object,omitempty"` // kind, namespace and name
	Error  string `json:"error"`
}

func (p Problem) String() string {
	var parts []string
	for _, s := range []string{p.Where, p.Object, p.Error} {
		if s != "" {
			parts = append(parts, s)
		}
	}
	return strings.Join(parts, ": ")
}

// result is what the leader says about one revision of a file.
type result struct {
	Revision int64     `json:"revision"`
	State    State     `json:"state"`
	Objects  int       `json:"objects"`
	Problems []Problem `json:"problems,omitempty"`
	Remarks  []string  `json:"remarks,omitempty"` // what is no error, but not as one may think
	At       time.Time `json:"at"`
}

func (r record) result() result {
	res := result{State: Pending}
	if err := json.Unmarshal(r.secret.Data[keyStatus], &res); err != nil || res.Revision != r.revision {
		return result{State: Pending}
	}
	return res
}
