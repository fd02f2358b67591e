/* A QEMU TCG plugin (plugin interface 1: QEMU 6 to 8) that counts guest instructions.
 *
 * At every getppid(2) of the guest it prints how many were executed since the one before: the
 * program that is measured brackets a region with that call, which does nothing else.
 * Instructions are counted where a translation block is entered, so a block left early counts
 * in full; the counts of a region repeat to about one in a thousand.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define GETPPID_AARCH64 173
#define INLINE_ADD_U64 0

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_info;

extern void qemu_plugin_register_vcpu_tb_trans_cb(
    plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_inline(
    struct qemu_plugin_tb *, int operation, void *counter, uint64_t value);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_syscall_cb(
    plugin_id, void (*)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                        uint64_t, uint64_t, uint64_t, uint64_t));

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t executed, at_last_mark;

static void on_translation(plugin_id id, struct qemu_plugin_tb *block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(
        block, INLINE_ADD_U64, &executed, qemu_plugin_tb_n_insns(block));
}

static void on_syscall(plugin_id id, unsigned cpu, int64_t number, uint64_t a, uint64_t b,
                       uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    (void)id, (void)cpu, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number != GETPPID_AARCH64) return;
    fprintf(stderr, "instructions %llu\n", (unsigned long long)(executed - at_last_mark));
    at_last_mark = executed;
}

__attribute__((visibility("default"))) int qemu_plugin_install(
    plugin_id id, const struct qemu_info *info, int argc, char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    return 0;
}
