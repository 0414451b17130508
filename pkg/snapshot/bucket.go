// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/kedge-io/kedge/pkg/config"
)

const s3Scheme = "s3://"

// Bucket is a store in an S3 service.
type Bucket struct {
	client *minio.Client
	bucket string
	folder string // with a slash at its end, or empty
}

var _ Store = (*Bucket)(nil)

// NewBucket prepares requests. The credentials are read from their file at each request that needs them.
func NewBucket(c config.S3) (*Bucket, error) {
	u, err := url.Parse(c.Endpoint)
	if err != nil || u.Host == "" {
		return nil, errors.New("there is no S3 service: give snapshot-s3-endpoint, snapshot-s3-bucket and snapshot-s3-credentials")
	}
	if _, err := os.Stat(c.CredentialsFile); err != nil {
		return nil, fmt.Errorf("snapshot-s3-credentials: %w", err)
	}
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: time.Minute, DisableCompression: true,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}}
	if c.CAFile != "" {
		text, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("snapshot-s3-cafile: %w", err)
		}
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("snapshot-s3-cafile: there is no certificate in %s", c.CAFile)
		}
	}
	o := &minio.Options{Secure: u.Scheme == "https", Transport: transport, MaxRetries: 3, Region: c.Region,
		Creds: credentials.NewFileAWSCredentials(c.CredentialsFile, "default")}
	if o.Region == "" {
		o.Region = "us-east-1"
	}
	if c.PathStyle {
		o.BucketLookup = minio.BucketLookupPath
	}
	client, err := minio.New(u.Host, o)
	if err != nil {
		return nil, fmt.Errorf("S3 service %s: %w", c.Endpoint, err)
	}
	b := &Bucket{client: client, bucket: c.Bucket}
	if c.Folder != "" {
		b.folder = c.Folder + "/"
	}
	return b, nil
}

// bucketFor finds the store and the name of s3://BUCKET/KEY, at the service of the settings.
func bucketFor(c config.S3, location string) (*Bucket, string, error) {
	rest := strings.TrimPrefix(location, s3Scheme)
	bucket, key, ok := strings.Cut(rest, "/")
	folder, base := path.Split(key)
	name, isSnapshot := strings.CutSuffix(base, Suffix)
	if !ok || bucket == "" || !isSnapshot || CheckName(name) != nil {
		return nil, "", fmt.Errorf("%q is not of the form s3://BUCKET/FOLDER/NAME%s", location, Suffix)
	}
	c.Bucket, c.Folder = bucket, strings.Trim(folder, "/")
	b, err := NewBucket(c)
	return b, name, err
}

func (b *Bucket) String() string { return s3Scheme + b.bucket + "/" + b.folder }

func (b *Bucket) key(name string) string { return b.folder + name + Suffix }

// explain makes clear where an error comes from.
func (b *Bucket) explain(what string, err error) error {
	if err == nil {
		return nil
	}
	switch minio.ToErrorResponse(err).Code {
	case minio.NoSuchKey:
		return fmt.Errorf("%s %s: %w", what, b, fs.ErrNotExist)
	case minio.NoSuchBucket:
		return fmt.Errorf("%s %s: the bucket does not exist: make it first", what, b)
	}
	return fmt.Errorf("%s %s: %w", what, b, err)
}

// metadataSize is what is read of a snapshot for a listing: its metadata are in it, but for clusters with hundreds of members.
const metadataSize = 64 << 10

// List reads the beginning of each snapshot in the folder, and nothing of what is in folders below it.
func (b *Bucket) List(ctx context.Context) ([]Entry, error) {
	var list []Entry
	for o := range b.client.ListObjectsIter(ctx, b.bucket, minio.ListObjectsOptions{Prefix: b.folder}) {
		if o.Err != nil {
			return nil, b.explain("list", o.Err)
		}
		name, ok := strings.CutSuffix(strings.TrimPrefix(o.Key, b.folder), Suffix)
		if !ok || CheckName(name) != nil {
			continue
		}
		e := Entry{Metadata: Metadata{Name: name, Created: o.LastModified.UTC()}, Location: s3Scheme + b.bucket + "/" + o.Key, Bytes: o.Size}
		m, err := b.metadata(ctx, name)
		switch {
		case errors.Is(err, fs.ErrNotExist): // deleted since
			continue
		case errors.Is(err, ErrDamaged):
			e.Problem = err.Error()
		case err != nil:
			return nil, err
		default:
			e.Metadata = *m
			e.Name = name
		}
		list = append(list, e)
	}
	sortEntries(list)
	return list, nil
}

func (b *Bucket) metadata(ctx context.Context, name string) (*Metadata, error) {
	var o minio.GetObjectOptions
	if err := o.SetRange(0, metadataSize-1); err != nil {
		return nil, err
	}
	r, err := b.get(ctx, name, o)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return readMetadata(r)
}

func (b *Bucket) get(ctx context.Context, name string, o minio.GetObjectOptions) (io.ReadCloser, error) {
	core := minio.Core{Client: b.client}
	r, _, _, err := core.GetObject(ctx, b.bucket, b.key(name), o)
	return r, b.explain("read "+name+" from", err)
}

// Open begins to download a snapshot.
func (b *Bucket) Open(ctx context.Context, name string) (io.ReadCloser, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	return b.get(ctx, name, minio.GetObjectOptions{})
}

// Delete removes a snapshot.
func (b *Bucket) Delete(ctx context.Context, name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	return b.explain("delete "+name+" from", b.client.RemoveObject(ctx, b.bucket, b.key(name), minio.RemoveObjectOptions{}))
}

// ErrTaken says that there is a snapshot of that name: servers of several names, and of several clusters, may share a folder.
var ErrTaken = errors.New("there is a snapshot of that name already")

// free is ErrTaken if there is a snapshot of a name.
func (b *Bucket) free(ctx context.Context, name string) error {
	m, err := b.metadata(ctx, name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err == nil:
		return fmt.Errorf("%s: %w, taken on server %s at %s: choose another name, or delete it", b.location(name), ErrTaken, m.Node, m.Created.Format(time.RFC3339))
	case errors.Is(err, ErrDamaged):
		return fmt.Errorf("%s: %w, a damaged one: choose another name, or delete it", b.location(name), ErrTaken)
	}
	return err
}

// Upload copies a snapshot of this machine there, unless there is one of that name, reads it back, and removes it again if it is not as it
// was. An object appears when it is complete, so that an interrupted upload leaves nothing under the name.
func (b *Bucket) Upload(ctx context.Context, dir Directory, name string) error {
	if err := b.free(ctx, name); err != nil {
		return err
	}
	f, err := os.Open(dir.Path(name))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	_, err = b.client.PutObject(ctx, b.bucket, b.key(name), f, info.Size(), minio.PutObjectOptions{ContentType: "application/x-tar", NumThreads: 1, PartSize: 16 << 20})
	if err != nil {
		return b.explain("copy "+name+" to", err)
	}
	if _, err := Check(ctx, b, name); errors.Is(err, ErrDamaged) {
		return errors.Join(fmt.Errorf("the snapshot was read back from %s and is not as it was: %w", b, err), b.Delete(ctx, name))
	} else if err != nil {
		return err
	}
	return nil
}
