// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"encoding/json"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Chart is a Helm chart.
type Chart struct {
	Name, Version string
	Archive       []byte
}

// addCharts puts charts where Helm looks for them: as artifacts of a registry, and in a repository with an index.
func (c *content) addCharts(repository *http.ServeMux, charts []Chart) error {
	index := map[string]any{"apiVersion": "v1"}
	entries := map[string][]map[string]any{}
	tags := map[string][]string{}
	for _, chart := range charts {
		config, err := json.Marshal(map[string]string{"apiVersion": "v2", "name": chart.Name, "version": chart.Version})
		if err != nil {
			return err
		}
		manifest, err := json.Marshal(v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
			Config: c.blob("application/vnd.cncf.helm.config.v1+json", config),
			Layers: []v1.Descriptor{c.blob("application/vnd.cncf.helm.chart.content.v1.tar+gzip", chart.Archive)}})
		if err != nil {
			return err
		}
		d := c.blob(v1.MediaTypeImageManifest, manifest).Digest
		c.tags["charts/"+chart.Name+":"+chart.Version], c.types[d] = d, v1.MediaTypeImageManifest
		tags["charts/"+chart.Name] = append(tags["charts/"+chart.Name], chart.Version)
		file := chart.Name + "-" + chart.Version + ".tgz"
		entries[chart.Name] = append(entries[chart.Name], map[string]any{"apiVersion": "v2", "name": chart.Name, "version": chart.Version, "urls": []string{file}})
		repository.HandleFunc("/"+file, func(w http.ResponseWriter, r *http.Request) {
			http.ServeContent(w, r, file, time.Time{}, bytes.NewReader(chart.Archive))
		})
	}
	for name, list := range tags {
		text, err := json.Marshal(map[string]any{"name": name, "tags": list})
		if err != nil {
			return err
		}
		repository.HandleFunc("/v2/"+name+"/tags/list", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(text))
		})
	}
	index["entries"] = entries
	text, err := json.Marshal(index) // which is YAML
	if err != nil {
		return err
	}
	repository.HandleFunc("/index.yaml", func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "index.yaml", time.Time{}, bytes.NewReader(text))
	})
	return nil
}

func (c *content) blob(mediaType string, data []byte) v1.Descriptor {
	d := digest.FromBytes(data)
	c.blobs[d] = data
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}
