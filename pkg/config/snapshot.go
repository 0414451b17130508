// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
)

// Snapshot is how the datastore is saved.
type Snapshot struct {
	Schedule  Schedule `json:"schedule"`  // default 12h
	Retention int      `json:"retention"` // scheduled snapshots that are kept, at least 1; default 5
	Dir       string   `json:"dir"`       // absolute; default data-dir/snapshots
	Compress  bool     `json:"compress"`  // default true
	S3        S3       `json:"s3"`
}

// S3 is a bucket that snapshots are copied to. The zero value is none.
type S3 struct {
	Endpoint        string `json:"endpoint,omitempty"` // https://HOST[:PORT], or http://
	Bucket          string `json:"bucket,omitempty"`
	Folder          string `json:"folder,omitempty"`          // without slashes at its ends
	Region          string `json:"region,omitempty"`          // default us-east-1
	CredentialsFile string `json:"credentialsFile,omitempty"` // absolute
	CAFile          string `json:"caFile,omitempty"`          // absolute
	PathStyle       bool   `json:"pathStyle,omitempty"`
}

// Used says whether there is such a bucket.
func (s S3) Used() bool { return s.Endpoint != "" }

// Snapshots is how the datastore is saved, with all defaults.
func (s *Config) Snapshots() Snapshot {
	o := s.Snapshot
	o.Dir = cmp.Or(o.Dir, filepath.Join(s.DataDir, "snapshots"))
	return o
}

// Schedule is when snapshots are taken: an interval (12h), five fields of cron in local time (30 3 * * *), or off.
type Schedule string

// ScheduleOff takes none.
const ScheduleOff Schedule = "off"

// minInterval between snapshots: more often they would wear the disk for nothing.
const minInterval = 5 * time.Minute

// Next is when the snapshot after one at t is due. A schedule that is off has none: ok is false.
func (s Schedule) Next(t time.Time) (next time.Time, ok bool) {
	if s == ScheduleOff || s == "" {
		return time.Time{}, false
	}
	schedule, err := s.parse()
	if err != nil { // it was parsed before
		return time.Time{}, false
	}
	return schedule.Next(t), true
}

func (s Schedule) parse() (cron.Schedule, error) {
	if d, err := time.ParseDuration(string(s)); err == nil {
		if d < minInterval {
			return nil, fmt.Errorf("%s is too often; give %s or longer", d, minInterval)
		}
		return cron.Every(d), nil
	}
	return cron.ParseStandard(string(s))
}

func snapshotSchedule(text string) (Schedule, error) {
	s := Schedule(strings.TrimSpace(text))
	if s == ScheduleOff {
		return s, nil
	}
	if strings.HasPrefix(string(s), "@every ") {
		s = Schedule(strings.TrimPrefix(string(s), "@every "))
	}
	if _, err := s.parse(); err != nil {
		return "", fmt.Errorf("%q is no schedule: %w; accepted: an interval like 12h, five fields of cron like \"30 3 * * *\", or off", text, err)
	}
	return s, nil
}

func positive(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%q is no number of 1 or more", s)
	}
	return n, nil
}

func s3Endpoint(text string) (string, error) {
	u, err := url.Parse(text)
	if err == nil && !strings.Contains(text, "://") {
		return s3Endpoint("https://" + text)
	}
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.User != nil || u.RawQuery != "" {
		return "", fmt.Errorf("%q is not https://HOST[:PORT] (or http://)", text)
	}
	return u.Scheme + "://" + u.Host, nil
}

func s3Folder(text string) (string, error) {
	folder := strings.Trim(text, "/")
	for part := range strings.SplitSeq(folder, "/") {
		if part == "" || part == "." || part == ".." {
			return "", fmt.Errorf("%q is no folder of a bucket; give names with slashes between them", text)
		}
	}
	return folder, nil
}

func (s *Config) validateSnapshots(sources map[string]string) error {
	t := s.Snapshot.S3
	if !t.Used() {
		var errs []error
		for option, value := range map[string]string{"snapshot-s3-bucket": t.Bucket, "snapshot-s3-folder": t.Folder, "snapshot-s3-region": t.Region,
			"snapshot-s3-credentials": t.CredentialsFile, "snapshot-s3-cafile": t.CAFile} {
			if value != "" {
				errs = append(errs, fmt.Errorf("%s: there is no snapshot-s3-endpoint", sources[option]))
			}
		}
		return errors.Join(errs...)
	}
	var errs []error
	for option, value := range map[string]string{"snapshot-s3-bucket": t.Bucket, "snapshot-s3-credentials": t.CredentialsFile} {
		if value == "" {
			errs = append(errs, fmt.Errorf("%s: give %s too", sources["snapshot-s3-endpoint"], option))
		}
	}
	return errors.Join(errs...)
}
