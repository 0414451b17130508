// SPDX-License-Identifier: Apache-2.0

package pki

import "github.com/prometheus/client_golang/prometheus"

// Collector exports when the certificates of a machine end. Files are read at each scrape: they are few and small.
func Collector(places Places) prometheus.Collector {
	return collector{places, prometheus.NewDesc("kedge_certificate_expiration_seconds",
		"When a certificate of this machine ends, in seconds since 1970.", []string{"name"}, nil)}
}

type collector struct {
	places Places
	desc   *prometheus.Desc
}

// Describe sends the one description.
func (c collector) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

// Collect sends a value for each certificate that can be read.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	for _, s := range Inspect(c.places) {
		if !s.NotAfter.IsZero() {
			ch <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(s.NotAfter.Unix()), string(s.Name))
		}
	}
}
