/* Makes a program see an x86-64 processor with AVX2 and without AVX-512 and VNNI, at full speed.
 *
 *     cc -O1 -shared -fPIC -o avx2_only.so avx2_only.c && LD_PRELOAD=./avx2_only.so python3 ...
 *
 * The kernel makes every CPUID instruction trap (arch_prctl(2), ARCH_SET_CPUID; needs the flag
 * cpuid_fault in /proc/cpuinfo); the handler answers with the real leaf, less those features.
 * onnxruntime then chooses the kernels it has for such a processor. Threads inherit the setting,
 * programs started by this one load the library again.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))

static void on_trap(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)registers[REG_RIP];
    (void)info;
    if (at[0] != 0x0f || at[1] != 0xa2) { /* a real fault: let it happen */
        signal(number, SIG_DFL);
        return;
    }
    unsigned leaf = registers[REG_RAX], sub = registers[REG_RCX], a, b, c, d;
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, sub, a, b, c, d);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    if (leaf == 7 && sub == 0) {
        b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
        c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));
        d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
    }
    if (leaf == 7 && sub == 1) { /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA, AVX-VNNI-INT8/16 */
        a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));
        d = 0;
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_trap;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGSEGV, &action, NULL);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
        perror("avx2_only: CPUID cannot be made to trap here");
        _exit(99);
    }
}
