//! Kernels that lack something: a system call is taken from one process (seccomp(2)).

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Load the 32-bit word at an offset of `struct seccomp_data`.
const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
/// Skip an instruction unless the loaded word is this.
const SKIP_UNLESS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Has `command`'s program find that `syscall` fails with `errno`, as on a kernel without it.
pub fn without_syscall(command: &mut Command, syscall: libc::c_long, errno: i32) {
    let number = u32::try_from(syscall).expect("system calls have small numbers");
    let refuse = libc::SECCOMP_RET_ERRNO | errno.unsigned_abs();
    // The number is the first word of seccomp_data.
    let filter = [
        libc::sock_filter {
            code: LOAD,
            jt: 0,
            jf: 0,
            k: 0,
        },
        libc::sock_filter {
            code: SKIP_UNLESS,
            jt: 0,
            jf: 1,
            k: number,
        },
        libc::sock_filter {
            code: RETURN,
            jt: 0,
            jf: 0,
            k: refuse,
        },
        libc::sock_filter {
            code: RETURN,
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ALLOW,
        },
    ];
    // SAFETY: between fork and exec only prctl(2) is called, which allocates nothing.
    unsafe {
        command.pre_exec(move || install(&filter));
    }
}

fn install(filter: &[libc::sock_filter; 4]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        // The kernel copies it and writes nothing.
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program points to `len` instructions that live through the call.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) == 0
    };
    if done {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
