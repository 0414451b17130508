/* SPDX-License-Identifier: Apache-2.0 */

/*
 * A library that the launcher preloads: names and numbers of IP protocols
 * (IANA's) without /etc/protocols, which minimal systems do not have. ipset and
 * nft cannot parse "tcp" without it.
 */
#include <netdb.h>
#include <stddef.h>
#include <strings.h>

static char *none[] = {NULL};
static char *icmpv6[] = {"icmpv6", NULL};

static struct protoent table[] = {
	{"ip", none, 0},       {"icmp", none, 1},     {"igmp", none, 2},        {"ipencap", none, 4},       {"tcp", none, 6},
	{"egp", none, 8},      {"udp", none, 17},     {"dccp", none, 33},       {"ipv6", none, 41},         {"ipv6-route", none, 43},
	{"ipv6-frag", none, 44}, {"rsvp", none, 46},  {"gre", none, 47},        {"esp", none, 50},          {"ah", none, 51},
	{"ipv6-icmp", icmpv6, 58}, {"ipv6-nonxt", none, 59}, {"ipv6-opts", none, 60}, {"eigrp", none, 88},  {"ospf", none, 89},
	{"ipip", none, 94},    {"etherip", none, 97}, {"encap", none, 98},      {"pim", none, 103},         {"ipcomp", none, 108},
	{"vrrp", none, 112},   {"l2tp", none, 115},   {"isis", none, 124},      {"sctp", none, 132},        {"mobility-header", none, 135},
	{"udplite", none, 136}, {"mpls-in-ip", none, 137},
};

struct protoent *getprotobyname(const char *name)
{
	for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
		if (strcasecmp(name, table[i].p_name) == 0)
			return &table[i];
		for (char **alias = table[i].p_aliases; *alias; alias++)
			if (strcasecmp(name, *alias) == 0)
				return &table[i];
	}
	return NULL;
}

struct protoent *getprotobynumber(int number)
{
	for (size_t i = 0; i < sizeof table / sizeof *table; i++)
		if (table[i].p_proto == number)
			return &table[i];
	return NULL;
}
