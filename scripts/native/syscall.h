/* SPDX-License-Identifier: Apache-2.0 */

/*
 * The few system calls that the programs of this directory need, without a C
 * library: the result is a static file of some kilobytes that runs on every
 * Linux, whatever its libc.
 */
#ifndef KEDGE_SYSCALL_H
#define KEDGE_SYSCALL_H

#define AT_FDCWD (-100)

#if defined(__x86_64__)

enum {
	SYS_write = 1, SYS_rt_sigprocmask = 14, SYS_execve = 59, SYS_exit_group = 231,
	SYS_wait4 = 61, SYS_rt_sigtimedwait = 128, SYS_readlinkat = 267,
};

/* Entry: the stack pointer holds argc, argv, NULL, environment, NULL. */
__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rsp, %rdi\n"
	"	and $-16, %rsp\n"
	"	call start\n");

static long syscall4(long n, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	long r;
	__asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return r;
}

#elif defined(__aarch64__)

enum {
	SYS_write = 64, SYS_readlinkat = 78, SYS_exit_group = 94, SYS_rt_sigprocmask = 135,
	SYS_rt_sigtimedwait = 137, SYS_execve = 221, SYS_wait4 = 260,
};

__asm__(".globl _start\n"
	"_start:\n"
	"	mov x29, #0\n"
	"	mov x30, #0\n"
	"	mov x0, sp\n"
	"	bl start\n");

static long syscall4(long n, long a, long b, long c, long d)
{
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
}

#else
#error "this architecture is not supported yet"
#endif

static __attribute__((noreturn)) void exit_group(int status)
{
	for (;;)
		syscall4(SYS_exit_group, status, 0, 0, 0);
}

#endif
