//! The system calls that the standard library lacks, each as a safe function. All of init's unsafe code is here.
//!
//! The functions are those of the C library, which the standard library brings along; the numbers are those of Linux on
//! x86-64 (the kernel's uapi headers).

mod network;
mod terminal;

use std::ffi::{CStr, CString, OsStr, OsString, c_char, c_int, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::time::Duration;

pub use network::{Interface, Packets, device_news, receive};
pub use terminal::{interrupt_key, open_terminal, resize};

/// `struct timespec`.
#[repr(C)]
struct TimeSpec {
    seconds: i64,
    nanoseconds: i64,
}

/// `struct pollfd`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PollFd {
    fd: RawFd,
    events: i16,
    revents: i16,
}

/// `sigset_t` of the C library: 1024 bits.
#[repr(C)]
struct SignalSet([u64; 16]);

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn umount2(target: *const c_char, flags: c_int) -> c_int;
    fn mknod(path: *const c_char, mode: u32, device: u64) -> c_int;
    fn syscall(number: i64, ...) -> i64;
    fn sync();
    fn reboot(how: c_int) -> c_int;
    fn sethostname(name: *const c_char, len: usize) -> c_int;
    fn clock_settime(clock: c_int, time: *const TimeSpec) -> c_int;
    fn clock_gettime(clock: c_int, time: *mut TimeSpec) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn sigemptyset(set: *mut SignalSet) -> c_int;
    fn sigaddset(set: *mut SignalSet, signal: c_int) -> c_int;
    fn sigprocmask(how: c_int, set: *const SignalSet, old: *mut SignalSet) -> c_int;
    fn signal(signal: c_int, handler: usize) -> usize;
    fn signalfd(fd: c_int, set: *const SignalSet, flags: c_int) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn setsid() -> c_int;
    fn execve(path: *const c_char, argv: *const *const c_char, envp: *const *const c_char)
    -> c_int;
    fn getpid() -> c_int;
    fn setgroups(count: usize, groups: *const u32) -> c_int;
    fn setgid(group: u32) -> c_int;
    fn setuid(user: u32) -> c_int;
    fn umask(mask: u32) -> u32;
    fn pipe2(fds: *mut [c_int; 2], flags: c_int) -> c_int;
}

const SYS_FINIT_MODULE: i64 = 313;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Takes over a descriptor that a call has just made.
fn owned(result: c_int) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the kernel has just opened `fd` for this process, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Flags of mount(2).
pub const MS_RDONLY: c_ulong = 1;
pub const MS_NOSUID: c_ulong = 2;
pub const MS_NODEV: c_ulong = 4;
pub const MS_NOEXEC: c_ulong = 8;
pub const MS_REMOUNT: c_ulong = 32;
pub const MS_BIND: c_ulong = 4096;
pub const MS_MOVE: c_ulong = 8192;

/// mount(2).
pub fn mount_at(
    source: &OsStr,
    target: &OsStr,
    kind: &str,
    flags: c_ulong,
    options: &OsStr,
) -> io::Result<()> {
    let (source, target) = (c_string(source)?, c_string(target)?);
    let (kind, options) = (c_string(OsStr::new(kind))?, c_string(options)?);
    // SAFETY: all four are strings that end in a zero byte and outlive the call, which keeps none of them.
    let result = unsafe {
        mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            options.as_ptr().cast(),
        )
    };
    check(result).map(drop)
}

/// umount2(2).
pub fn unmount(target: &OsStr) -> io::Result<()> {
    let target = c_string(target)?;
    // SAFETY: `target` ends in a zero byte and outlives the call.
    check(unsafe { umount2(target.as_ptr(), 0) }).map(drop)
}

/// Makes a character device that everybody may use.
pub fn make_device(path: &OsStr, major: u64, minor: u64) -> io::Result<()> {
    const S_IFCHR: u32 = 0o020_000;
    let path = c_string(path)?;
    // SAFETY: `path` ends in a zero byte and outlives the call.
    check(unsafe { mknod(path.as_ptr(), S_IFCHR | 0o666, major << 8 | minor) }).map(drop)
}

/// finit_module(2): loads a kernel module without parameters.
pub fn load_module(file: &File) -> io::Result<()> {
    let parameters: &CStr = c"";
    // SAFETY: finit_module(fd, parameters, flags) takes these three; the string outlives the call.
    let result = unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), parameters.as_ptr(), 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// sync(2).
pub fn sync_all() {
    // SAFETY: it takes nothing and touches no memory of this process.
    unsafe { sync() }
}

/// Powers the machine off. Returns only when the kernel does not let it.
pub fn power_off() {
    const RB_POWER_OFF: c_int = 0x4321_fedc;
    // SAFETY: it touches no memory of this process.
    unsafe { reboot(RB_POWER_OFF) };
}

/// sethostname(2).
pub fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: `name` is so many bytes long.
    check(unsafe { sethostname(name.as_ptr().cast(), name.len()) }).map(drop)
}

const CLOCK_REALTIME: c_int = 0;

/// Sets the wall clock, to a time since 1970.
pub fn set_clock(since_1970: Duration) -> io::Result<()> {
    let time = TimeSpec {
        seconds: since_1970.as_secs() as i64,
        nanoseconds: i64::from(since_1970.subsec_nanos()),
    };
    // SAFETY: `time` is a struct timespec that outlives the call.
    check(unsafe { clock_settime(CLOCK_REALTIME, &time) }).map(drop)
}

/// The wall clock, as time since 1970.
pub fn clock() -> Duration {
    read_clock(CLOCK_REALTIME)
}

/// Time since the kernel started.
pub fn since_boot() -> Duration {
    const CLOCK_BOOTTIME: c_int = 7;
    read_clock(CLOCK_BOOTTIME)
}

fn read_clock(clock: c_int) -> Duration {
    let mut time = TimeSpec {
        seconds: 0,
        nanoseconds: 0,
    };
    // SAFETY: `time` is a struct timespec for the call to fill.
    unsafe { clock_gettime(clock, &mut time) };
    Duration::new(time.seconds as u64, time.nanoseconds as u32)
}

/// Bits of `struct pollfd`.
pub const POLLIN: i16 = 1;
pub const POLLOUT: i16 = 4;
pub const POLLERR: i16 = 8;

impl PollFd {
    pub fn new(fd: BorrowedFd<'_>, events: i16) -> PollFd {
        PollFd {
            fd: fd.as_raw_fd(),
            events,
            revents: 0,
        }
    }

    /// What came of it.
    pub fn found(&self) -> i16 {
        self.revents
    }
}

/// poll(2), for `timeout` at most, or without end. A signal counts as nothing found.
pub fn wait_for(fds: &mut [PollFd], timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map_or(-1, |timeout| {
        c_int::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(c_int::MAX)
    });
    // SAFETY: `fds` are so many structs, which the call writes to and does not keep.
    let result = check(unsafe { poll(fds.as_mut_ptr(), fds.len() as c_ulong, timeout) });
    match result {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        result => result.map(drop),
    }
}

/// Makes reads and writes return at once.
pub fn set_nonblocking(fd: &impl AsFd) -> io::Result<()> {
    const F_GETFL: c_int = 3;
    const F_SETFL: c_int = 4;
    const O_NONBLOCK: c_int = 0o4000;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: these two commands take and give numbers only.
    let flags = check(unsafe { fcntl(fd, F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { fcntl(fd, F_SETFL, flags | O_NONBLOCK) }).map(drop)
}

/// Takes over descriptor number `fd`, which was handed to this process when it started.
///
/// # Errors
/// When it is none of this process's.
pub fn inherited(fd: RawFd) -> io::Result<File> {
    const F_SETFD: c_int = 2;
    const FD_CLOEXEC: c_int = 1;
    // SAFETY: the command takes and gives numbers only.
    check(unsafe { fcntl(fd, F_SETFD, FD_CLOEXEC) })?;
    // SAFETY: it is open, and this is called once, at the start, for a descriptor that nothing else here knows.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// A pipe: the reading end, the writing end.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    const O_CLOEXEC: c_int = 0o2_000_000;
    let mut fds = [-1; 2];
    // SAFETY: the call fills the two numbers.
    check(unsafe { pipe2(&mut fds, O_CLOEXEC) })?;
    let [read, write] = fds;
    Ok((owned(read)?, owned(write)?))
}

pub const SIGINT: c_int = 2;
pub const SIGKILL: c_int = 9;
pub const SIGTERM: c_int = 15;
pub const SIGCHLD: c_int = 17;
pub const SIGPWR: c_int = 30;

/// A descriptor that reads the signals in `signals`, which do nothing else any more.
pub fn signals(signals: &[c_int]) -> io::Result<OwnedFd> {
    const SIG_BLOCK: c_int = 0;
    const SFD_NONBLOCK_CLOEXEC: c_int = 0o2_004_000;
    let mut set = SignalSet([0; 16]);
    // SAFETY: `set` is a sigset_t for these calls to fill and read.
    unsafe {
        sigemptyset(&mut set);
        for signal in signals {
            sigaddset(&mut set, *signal);
        }
        check(sigprocmask(SIG_BLOCK, &set, std::ptr::null_mut()))?;
        owned(signalfd(-1, &set, SFD_NONBLOCK_CLOEXEC))
    }
}

/// How a process ended, as waitpid(2) tells.
#[derive(Clone, Copy)]
pub enum Ended {
    Exited(u8),
    Killed(u8),
}

/// What there is to know of processes that have ended.
pub enum Reaped {
    /// This one has, like so. It was started here, or left by one that was.
    Process(u32, Ended),
    /// All that are left still run.
    NothingNew,
    NoneLeft,
}

/// Asks for one process that has ended.
pub fn reap() -> Reaped {
    const WNOHANG: c_int = 1;
    let mut status = 0;
    // SAFETY: the call fills `status`.
    let pid = unsafe { waitpid(-1, &mut status, WNOHANG) };
    match u32::try_from(pid) {
        Err(_) => Reaped::NoneLeft,
        Ok(0) => Reaped::NothingNew,
        Ok(pid) => Reaped::Process(
            pid,
            match status & 0x7f {
                0 => Ended::Exited((status >> 8) as u8),
                signal => Ended::Killed(signal as u8),
            },
        ),
    }
}

/// Sends a signal to the process group that `leader` leads.
pub fn kill_group(leader: u32, signal: u32) -> io::Result<()> {
    match (c_int::try_from(leader), c_int::try_from(signal)) {
        // -1 would be all processes, and 0 is this one's own group.
        (Ok(leader), Ok(signal)) if leader > 1 => {
            // SAFETY: it touches no memory of this process.
            check(unsafe { kill(-leader, signal) }).map(drop)
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Sends a signal to every process but this one, if this is the first process of its world; no other may.
pub fn kill_all(signal: c_int) {
    // SAFETY: these touch no memory of this process.
    unsafe {
        if getpid() == 1 {
            kill(-1, signal);
        }
    }
}

/// Whether this is the first process.
pub fn is_first() -> bool {
    // SAFETY: it touches no memory of this process.
    unsafe { getpid() == 1 }
}

/// Lets no file mode be narrower than what its maker asks for, but for writing by others.
pub fn set_umask() {
    // SAFETY: it touches no memory of this process.
    unsafe { umask(0o022) };
}

/// What a process is to become.
pub struct Start<'a> {
    pub program: &'a OsStr,
    pub arguments: Vec<&'a OsStr>,
    /// Each a name, an equals sign and a value.
    pub environment: Vec<OsString>,
    /// Whether its standard input is its terminal.
    pub terminal: bool,
    pub user: u32,
    pub group: u32,
    pub groups: &'a [u32],
}

/// Lets `process`, of which only the directory and the standard streams count, become `start`: in a session of its own
/// and with no signal blocked or ignored. Unlike the standard library, this does not hand to a shell what is no program.
pub fn prepare(process: &mut std::process::Command, start: &Start<'_>) -> io::Result<()> {
    const TIOCSCTTY: c_ulong = 0x540e;
    const SIG_SETMASK: c_int = 2;
    const SIG_DFL: usize = 0;
    const LAST_SIGNAL: c_int = 64;
    let program = c_string(start.program)?;
    let arguments = start.arguments.iter().map(|text| c_string(text));
    let arguments = arguments.collect::<io::Result<Vec<CString>>>()?;
    let environment = start.environment.iter().map(|text| c_string(text));
    let environment = environment.collect::<io::Result<Vec<CString>>>()?;
    let (terminal, user, group) = (start.terminal, start.user, start.group);
    let groups = start.groups.to_vec();
    let list = |strings: &[CString]| -> Vec<usize> {
        let addresses = strings.iter().map(|string| string.as_ptr() as usize);
        addresses.chain([0]).collect()
    };
    let (argv, envp) = (list(&arguments), list(&environment));
    let become_it = move || {
        // The lists hold the addresses of these.
        let _ = (&arguments, &environment);
        // SAFETY: these calls are safe in a process that has just been forked: they allocate nothing and take no lock
        // that another thread could hold, since there is no other. `groups` is as long as it says. Both lists end in a
        // null pointer, and the strings that they point to are owned by this closure.
        unsafe {
            // The standard library leaves the signals blocked that this process reads from a descriptor.
            let none = SignalSet([0; 16]);
            check(sigprocmask(SIG_SETMASK, &none, std::ptr::null_mut()))?;
            // What whoever started this process ignored is not to be ignored by the command. Two signals cannot be set.
            for number in 1..=LAST_SIGNAL {
                signal(number, SIG_DFL);
            }
            check(setsid())?;
            if terminal {
                check(ioctl(0, TIOCSCTTY, 0))?;
            }
            if user != 0 || group != 0 || !groups.is_empty() {
                check(setgroups(groups.len(), groups.as_ptr()))?;
                check(setgid(group))?;
                check(setuid(user))?;
            }
            let (argv, envp) = (argv.as_ptr().cast(), envp.as_ptr().cast());
            check(execve(program.as_ptr(), argv, envp)).map(drop)
        }
    };
    // SAFETY: what runs between fork and exec is described above.
    unsafe { process.pre_exec(become_it) };
    Ok(())
}
