/* SPDX-License-Identifier: Apache-2.0 */

/*
 * Stands under the name of a packaged tool (nft, iptables …) and runs the real
 * program with the loader and the libraries that came with it, so that neither
 * the machine's libc nor its shell matters. For the directory DIR that this
 * file is in:
 *
 *   XTABLES_LIBDIR=DIR/lib/xtables \
 *   DIR/lib/LOADER --inhibit-cache --library-path DIR/lib --preload libprotocols.so --argv0 NAME DIR/lib/exec/PROGRAM ARGUMENTS
 *
 * LOADER and PROGRAM are set when it is compiled. NAME is this file's own name,
 * which programs like xtables-nft-multi choose what to do by. The variables
 * LD_* are dropped: they are meant for the machine's own libraries.
 */
#include "syscall.h"

enum { PATH_MAX = 4096 };

static unsigned long length(const char *s)
{
	unsigned long n = 0;

	while (s[n])
		n++;
	return n;
}

static int starts(const char *s, const char *prefix)
{
	while (*prefix)
		if (*s++ != *prefix++)
			return 0;
	return 1;
}

/* to = a + b + c; returns to. The caller has checked the length. */
static char *join(char *to, const char *a, const char *b, const char *c)
{
	char *p = to;

	while (*a)
		*p++ = *a++;
	while (*b)
		*p++ = *b++;
	while (*c)
		*p++ = *c++;
	*p = 0;
	return to;
}

static __attribute__((noreturn)) void fail(const char *name, const char *why)
{
	static char message[2 * PATH_MAX];

	join(message, name, ": ", why);
	syscall4(SYS_write, 2, (long)message, length(message), 0);
	exit_group(127);
}

__attribute__((noreturn, used)) void start(long *sp)
{
	static char dir[PATH_MAX], loader[PATH_MAX + 64], libs[PATH_MAX + 64], program[PATH_MAX + 64], xtables[PATH_MAX + 64];
	long argc = sp[0], envc = 0, n;
	char **argv = (char **)(sp + 1), **envp = argv + argc + 1, *name;

	n = syscall4(SYS_readlinkat, AT_FDCWD, (long)"/proc/self/exe", (long)dir, sizeof dir - 1);
	if (n <= 0)
		fail(PROGRAM, "cannot find the directory it is in: /proc is not mounted\n");
	dir[n] = 0;
	while (dir[n] != '/')
		n--;
	dir[n] = 0;
	name = dir + n + 1;

	while (envp[envc])
		envc++;
	char *args[argc + 9], *env[envc + 2];
	char **a = args, **e = env;

	*a++ = join(loader, dir, "/lib/", LOADER);
	*a++ = "--inhibit-cache";
	*a++ = "--library-path";
	*a++ = join(libs, dir, "/lib", "");
	*a++ = "--preload";
	*a++ = "libprotocols.so"; /* see protocols.c */
	*a++ = "--argv0";
	*a++ = name;
	*a++ = join(program, dir, "/lib/exec/", PROGRAM);
	for (long i = 1; i < argc; i++)
		*a++ = argv[i];
	*a = 0;

	*e++ = join(xtables, "XTABLES_LIBDIR=", dir, "/lib/xtables");
	for (long i = 0; i < envc; i++)
		if (!starts(envp[i], "LD_") && !starts(envp[i], "XTABLES_LIBDIR="))
			*e++ = envp[i];
	*e = 0;

	syscall4(SYS_execve, (long)loader, (long)args, (long)env, 0);
	fail(name, "cannot run its loader: a file of this installation is missing, restarting Kedge puts it back\n");
}
