//! The first process of a guest, without a guest: it is started in namespaces of its own, as their first process and
//! their root, in a directory that stands for the initramfs. A socket is the console port of the exec channel, and the
//! test is the host at its other end.
//!
//! Where a user may not make such namespaces these tests have nothing to run in, and say so.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command as Process, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sarang::guest::GUEST_INIT;
use sarang::guest::plan::{Command, FileSystem, Mount, Network, Plan, WindowSize};
use sarang::guest::protocol::host::{Event, Host};
use sarang::guest::protocol::{CommandId, End, Exit, MAIN, Stream, WINDOW};

/// Makes `$1` look like an initramfs that has the host's programs in it, and starts init there.
///
/// `/base` in it has a shell and what that needs, for tests that mount a root of their own.
const START: &str = r#"
set -e
mount -t tmpfs scratch "$1/root"
cd "$1/root"
for name in bin sbin lib lib64 usr; do
    if [ -L "/$name" ]; then cp -P "/$name" "$name"
    elif [ -d "/$name" ]; then mkdir "$name"; mount --rbind "/$name" "$name"
    fi
done
mkdir -p dev tmp sarang base/bin base/etc empty
chmod 1777 tmp
for name in null zero full random urandom tty; do
    touch "dev/$name"; mount --bind "/dev/$name" "dev/$name"
done
for program in sh cat ls; do
    program=$(readlink -f "$(command -v "$program")")
    for file in "$program" $(ldd "$program" | grep -o '/[^ ]*'); do
        mkdir -p "base/$(dirname "$file")"; cp -L "$file" "base/$file"
    done
    cp -L "$program" base/bin/
done
[ -e base/bin/sh ] || ln -s "$(basename "$(readlink -f "$(command -v sh)")")" base/bin/sh
echo below > base/etc/file
ln -s /run/nowhere base/etc/resolv.conf
cp "$1/init" init
cp "$1/plan" sarang/plan
exec chroot . /init --channel 0 /sarang/plan
"#;

/// Whether the tests have something to run in.
fn can_run() -> bool {
    let probe = "mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t tmpfs t /tmp";
    let probe = Process::new("unshare")
        .args(NAMESPACES)
        .args(["sh", "-c", probe])
        .output();
    let works = probe.is_ok_and(|output| output.status.success());
    if !works {
        eprintln!("not tested: namespaces cannot be made here, see unshare(1)");
    }
    works
}

const NAMESPACES: [&str; 9] = [
    "--user",
    "--map-root-user",
    "--pid",
    "--mount",
    "--net",
    "--uts",
    "--ipc",
    "--fork",
    "--kill-child",
];

/// What has come of a command.
#[derive(Default)]
struct Seen {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Option<Exit>,
    pid: Option<u32>,
}

impl Seen {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// An init and the host's end of its channel.
struct Guest {
    host: Host,
    socket: UnixStream,
    init: Child,
    seen: HashMap<CommandId, Seen>,
    /// Standard input that waits for room, and whether it ends then.
    input: HashMap<CommandId, (Vec<u8>, bool)>,
    /// Streams that nobody reads.
    stalled: Vec<(CommandId, Stream)>,
    phases: Vec<String>,
    errors: Vec<String>,
    stopping: bool,
    /// Commands whose interrupt key was pressed in vain.
    interrupted: Vec<CommandId>,
    closed: bool,
    _scratch: tempfile::TempDir,
}

impl Guest {
    fn boot(plan: &Plan) -> Guest {
        let scratch = tempfile::tempdir().unwrap();
        let path = |name: &str| scratch.path().join(name);
        fs::create_dir(path("root")).unwrap();
        fs::write(path("init"), GUEST_INIT).unwrap();
        fs::set_permissions(path("init"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(path("plan"), plan.encode().unwrap()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let init = Process::new("unshare")
            .args(NAMESPACES)
            .args(["sh", "-c", START, "start"])
            .arg(scratch.path())
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        let mut host = Host::new();
        let mut seen = HashMap::new();
        if let Some(main) = &plan.command {
            host.expect_main(main.terminal.is_some());
            seen.insert(MAIN, Seen::default());
        }
        Guest {
            host,
            socket: ours,
            init,
            seen,
            input: HashMap::new(),
            stalled: Vec::new(),
            phases: Vec::new(),
            errors: Vec::new(),
            stopping: false,
            interrupted: Vec::new(),
            closed: false,
            _scratch: scratch,
        }
    }

    /// Boots for `command`, whose input is empty.
    fn run(command: Command) -> Guest {
        let mut guest = Guest::boot(&Plan {
            command: Some(command),
            ..Plan::default()
        });
        guest.host.close(MAIN);
        guest
    }

    fn exec(&mut self, command: &Command) -> CommandId {
        let id = self.host.exec(command).unwrap();
        self.seen.insert(id, Seen::default());
        id
    }

    /// Moves bytes, and waits for some if there are none.
    fn step(&mut self) {
        for (id, (bytes, ends)) in &mut self.input {
            let count = self.host.write(*id, bytes);
            bytes.drain(..count);
            if bytes.is_empty() && *ends {
                self.host.close(*id);
            }
        }
        let output = self.host.output();
        let waits = !output.is_empty();
        match self.socket.write(output) {
            Ok(count) => self.host.sent(count),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(error) => panic!("{error}"),
        }
        let events = if waits {
            PollFlags::IN | PollFlags::OUT
        } else {
            PollFlags::IN
        };
        let limit = Timespec::try_from(Duration::from_secs(60)).unwrap();
        let mut fds = [PollFd::new(&self.socket, events)];
        let found = poll(&mut fds, Some(&limit)).unwrap();
        assert!(found > 0, "init is silent; its errors: {:?}", self.errors);
        let mut buffer = vec![0; 256 << 10];
        match self.socket.read(&mut buffer) {
            Ok(0) => self.closed = true,
            Ok(count) => self.host.feed(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // What was on its way to an init that has ended.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => self.closed = true,
            Err(error) => panic!("{error}"),
        }
        while let Some(event) = self.host.next_event().unwrap() {
            match event {
                Event::Started { id, pid } => self.seen.get_mut(&id).unwrap().pid = Some(pid),
                Event::Exit { id, exit } => self.seen.get_mut(&id).unwrap().exit = Some(exit),
                Event::Phase(phase) => self.phases.push(phase.name),
                Event::Error(why) => self.errors.push(why),
                Event::Stopping => self.stopping = true,
                Event::Interrupted { id } => self.interrupted.push(id),
            }
        }
        for (id, seen) in &mut self.seen {
            let sinks = [
                (Stream::Stdout, &mut seen.stdout),
                (Stream::Stderr, &mut seen.stderr),
            ];
            for (stream, sink) in sinks {
                while !self.stalled.contains(&(*id, stream)) {
                    let bytes = self.host.bytes(*id, stream);
                    if bytes.is_empty() {
                        break;
                    }
                    sink.extend(bytes);
                    let count = bytes.len();
                    self.host.consume(*id, stream, count);
                }
            }
        }
    }

    fn until(&mut self, mut done: impl FnMut(&Guest) -> bool) {
        while !done(self) {
            assert!(!self.closed, "init has gone; its errors: {:?}", self.errors);
            self.step();
        }
    }

    /// What came of the command, once it has ended.
    fn end_of(&mut self, id: CommandId) -> Seen {
        self.until(|guest| guest.seen[&id].exit.is_some());
        self.host.acknowledge(id);
        self.seen.remove(&id).unwrap()
    }

    /// What came of the command, and its end as a shell reports it.
    fn result(&mut self, command: &Command) -> (Seen, u8) {
        let id = self.exec(command);
        self.host.close(id);
        let seen = self.end_of(id);
        let code = seen.exit.as_ref().unwrap().end.exit_code();
        (seen, code)
    }

    /// Lets init end, which it must have a reason for by now.
    fn finish(mut self) {
        while !self.closed {
            self.step();
        }
        assert!(self.stopping, "init ends with a word: {:?}", self.errors);
        assert!(self.errors.is_empty(), "{:?}", self.errors);
        self.init.wait().unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.init.kill();
        let _ = self.init.wait();
    }
}

fn command(arguments: &[&str]) -> Command {
    Command {
        arguments: arguments.iter().map(|argument| argument.into()).collect(),
        environment: vec![("PATH".into(), "/usr/bin:/bin".into())],
        directory: "/".into(),
        ..Command::default()
    }
}

fn shell(script: &str) -> Command {
    command(&["sh", "-c", script])
}

#[test]
fn the_plans_command_runs_and_its_status_comes_behind_its_output() {
    if !can_run() {
        return;
    }
    let mut guest = Guest::run(shell("echo out; echo err >&2; pwd; echo $$; exit 3"));
    let seen = guest.end_of(MAIN);
    let pid = seen.pid.unwrap();
    assert_eq!(seen.text(), format!("out\n/\n{pid}\n"));
    assert_eq!(seen.stderr, b"err\n");
    assert_eq!(seen.exit, Some(End::Exited(3).into()));
    for phase in ["init", "modules", "root", "network"] {
        assert!(guest.phases.iter().any(|name| name == phase), "{phase}");
    }
    guest.finish();
}

#[test]
fn every_end_of_a_command_is_told_as_a_shell_would() {
    if !can_run() {
        return;
    }
    let mut guest = Guest::run(shell("exec sleep 1000"));
    let prepare = "
        mkdir /t && cd /t && echo hello > a-file && mkdir a-dir
        printf '#!/no/such/interpreter\\n' > script && chmod +x script
        printf '#!/bin/sh\\necho script $0 $1\\n' > good && chmod +x good
        printf 'echo no first line\\n' > bare && chmod +x bare
        printf '\\177ELF nonsense' > damaged && chmod +x damaged";
    assert_eq!(guest.result(&shell(prepare)).1, 0);
    for (arguments, code, words) in [
        (&["true"][..], 0, ""),
        (&["sh", "-c", "exit 255"], 255, ""),
        (&["sh", "-c", "kill -9 $$"], 137, ""),
        (&["sh", "-c", "kill -TERM $$"], 143, ""),
        (
            &["no-such-program"],
            127,
            "no program \"no-such-program\" in /t:/usr/bin",
        ),
        (&["/no/such/program"], 127, "no program /no/such/program"),
        (&["a-file/x"], 127, "no program /t/a-file/x"),
        (&[""], 127, "no program \"\""),
        (&["a-file"], 126, "/t/a-file may not be executed"),
        (&["a-dir"], 126, "/t/a-dir is a directory"),
        (&["./a-dir"], 126, "/t/./a-dir is a directory"),
        (&["/dev/null"], 126, "is not a file"),
        (
            &["./script"],
            126,
            "is a script for /no/such/interpreter, which is not there",
        ),
        (
            &["./damaged"],
            126,
            "neither a program for this machine nor a script",
        ),
    ] {
        let mut of_table = command(arguments);
        of_table.environment = vec![("PATH".into(), "/t:/usr/bin:/bin".into())];
        of_table.directory = "/t".into();
        let (seen, ended) = guest.result(&of_table);
        let said = match &seen.exit.unwrap().end {
            End::NotFound(why) | End::NotExecutable(why) | End::CouldNotStart(why) => why.clone(),
            _ => String::new(),
        };
        assert_eq!(ended, code, "{arguments:?}: {said}");
        assert!(said.contains(words), "{arguments:?}: {said}");
        assert_eq!(said.is_empty(), words.is_empty(), "{arguments:?}: {said}");
        assert_eq!(seen.pid.is_some(), words.is_empty());
    }
    let mut good = command(&["./good", "an argument"]);
    good.directory = "/t".into();
    assert_eq!(guest.result(&good).0.text(), "script ./good an argument\n");
    let mut lost = command(&["true"]);
    lost.directory = "/nowhere".into();
    let (seen, code) = guest.result(&lost);
    assert_eq!(code, 125, "{:?}", seen.exit);
    // Only user 0 exists in this namespace.
    let mut stranger = command(&["true"]);
    stranger.user = 12345;
    assert_eq!(guest.result(&stranger).1, 125);
    // And the plan's command still runs.
    guest.host.signal(MAIN, 15);
    assert_eq!(guest.end_of(MAIN).exit, Some(End::Killed(15).into()));
    guest.finish();
}

#[test]
fn a_command_sees_its_arguments_its_variables_and_nothing_of_init() {
    if !can_run() {
        return;
    }
    let mut main = shell("printf '%s|' \"$@\"; echo; env");
    main.arguments
        .extend(["name", "", "a b\nc", "*"].map(Into::into));
    main.environment.push(("X".into(), "y=z".into()));
    main.directory = "/usr".into();
    let mut guest = Guest::run(main);
    let signals = guest.exec(&command(&["cat", "/proc/self/status"]));
    let files = guest.exec(&command(&["ls", "-l", "/proc/self/fd"]));
    let (status, files) = (guest.end_of(signals).text(), guest.end_of(files).text());
    // No signal is blocked, and none is ignored; the last two of these are the C library's own.
    let masks = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        let mask = line.split_whitespace().nth(1).unwrap();
        u64::from_str_radix(mask, 16).unwrap() & !(0b11 << 31)
    };
    assert_eq!((masks("SigBlk"), masks("SigIgn")), (0, 0), "{status}");
    assert!(
        files.contains("pipe:") && !files.contains("socket:") && !files.contains("anon_inode"),
        "{files}"
    );
    let text = guest.end_of(MAIN).text();
    assert!(text.starts_with("|a b\nc|*|\n"), "{text}");
    assert!(
        text.contains("\nX=y=z\n") && text.contains("\nPWD=/usr\n"),
        "{text}"
    );
    guest.finish();
}

/// A byte of a stream whose parts differ from each other.
fn byte(at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16).wrapping_mul(31) as u8
}

#[test]
fn sixty_four_mebibytes_go_through_cat_and_back() {
    if !can_run() {
        return;
    }
    const LEN: usize = 64 << 20;
    let mut guest = Guest::boot(&Plan {
        command: Some(command(&["cat"])),
        ..Plan::default()
    });
    let (mut sent, mut received) = (0, 0);
    while guest.seen[&MAIN].exit.is_none() {
        let count = guest.host.room(MAIN).min(LEN - sent);
        let bytes: Vec<u8> = (sent..sent + count).map(byte).collect();
        sent += guest.host.write(MAIN, &bytes);
        if sent == LEN {
            guest.host.close(MAIN);
        }
        guest.step();
        let bytes = std::mem::take(&mut guest.seen.get_mut(&MAIN).unwrap().stdout);
        assert!(
            bytes
                .iter()
                .enumerate()
                .all(|(i, b)| *b == byte(received + i))
        );
        received += bytes.len();
    }
    assert_eq!(received, LEN);
    assert_eq!(guest.end_of(MAIN).exit, Some(End::Exited(0).into()));
    guest.finish();
}

#[test]
fn a_command_that_nobody_reads_does_not_hold_up_the_others() {
    if !can_run() {
        return;
    }
    let mut guest = Guest::boot(&Plan {
        command: Some(shell("head -c 3000000 /dev/zero; echo done >&2")),
        ..Plan::default()
    });
    guest.stalled.push((MAIN, Stream::Stdout));
    let cats: Vec<CommandId> = (0..4).map(|_| guest.exec(&command(&["cat"]))).collect();
    for (at, id) in cats.iter().enumerate() {
        guest
            .input
            .insert(*id, (vec![at as u8; 4 * WINDOW as usize], true));
    }
    for (at, id) in cats.iter().enumerate() {
        let seen = guest.end_of(*id);
        assert_eq!(seen.stdout, vec![at as u8; 4 * WINDOW as usize]);
        assert_eq!(seen.exit, Some(End::Exited(0).into()));
    }
    assert!(guest.seen[&MAIN].exit.is_none() && guest.seen[&MAIN].stderr.is_empty());
    guest.stalled.clear();
    let seen = guest.end_of(MAIN);
    assert_eq!(
        (seen.stdout.len(), &seen.stderr[..]),
        (3_000_000, &b"done\n"[..])
    );
    guest.finish();
}

#[test]
fn output_that_is_still_in_the_pipe_outlives_its_command() {
    if !can_run() {
        return;
    }
    // More than the credit, but with the pipe's 64 KiB the command can end before anything is read.
    let script = "head -c 300000 /dev/zero; sleep 1000 & exit 4";
    let mut guest = Guest::run(shell(script));
    guest.stalled.push((MAIN, Stream::Stdout));
    // The background process holds the pipe open; the main one is gone when it is no more than a zombie or less.
    guest.until(|guest| guest.seen[&MAIN].pid.is_some());
    let pid = guest.seen[&MAIN].pid.unwrap();
    let wait = format!("while [ -d /proc/{pid} ]; do sleep 0.02; done");
    assert_eq!(guest.result(&shell(&wait)).1, 0);
    assert!(guest.seen[&MAIN].exit.is_none(), "not before its output");
    guest.stalled.clear();
    let seen = guest.end_of(MAIN);
    assert_eq!(
        (seen.stdout.len(), seen.exit),
        (300_000, Some(End::Exited(4).into()))
    );
    guest.finish();
}

#[test]
fn a_pipe_breaks_at_both_ends_when_its_reader_goes() {
    if !can_run() {
        return;
    }
    let mut guest = Guest::run(command(&["yes"]));
    guest.until(|guest| !guest.seen[&MAIN].stdout.is_empty());
    guest.host.refuse(MAIN, Stream::Stdout);
    // SIGPIPE has its default action.
    assert_eq!(guest.end_of(MAIN).exit, Some(End::Killed(13).into()));
    guest.finish();

    let mut guest = Guest::run(command(&["sleep", "1000"]));
    let deaf = guest.exec(&shell("exec <&-; sleep 1000"));
    // It is told though nothing is written, so that a terminal or a file need not be read for nothing.
    while !guest.host.is_refused(deaf) {
        guest.step();
    }
    guest.host.shut_down();
    guest.finish();
}

#[test]
fn signals_reach_the_whole_process_group() {
    if !can_run() {
        return;
    }
    let script = "trap 'exit 9' USR1; (trap 'echo child; exit' USR1; echo ready; while :; do sleep 0.02; done) & while :; do wait; done";
    let mut guest = Guest::run(shell(script));
    guest.until(|guest| guest.seen[&MAIN].text().contains("ready"));
    guest.host.signal(MAIN, 10);
    let seen = guest.end_of(MAIN);
    assert_eq!(seen.exit, Some(End::Exited(9).into()));
    guest.finish();
}

#[test]
fn orphans_are_reaped_and_everything_ends_with_the_plans_command() {
    if !can_run() {
        return;
    }
    let mut guest = Guest::run(command(&["sleep", "1000"]));
    let script = "(sh -c 'exit 1' & sh -c 'exit 2' &) ; setsid sh -c 'trap \"\" TERM; sleep 1000' > /dev/null 2>&1 &";
    assert_eq!(guest.result(&shell(script)).1, 0);
    let zombies = "while grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null; do sleep 0.02; done";
    assert_eq!(guest.result(&shell(zombies)).1, 0);
    guest.host.signal(MAIN, 9);
    assert_eq!(guest.end_of(MAIN).exit, Some(End::Killed(9).into()));
    guest.finish();
}

#[test]
fn a_terminal_has_a_size_and_a_session_and_an_end_of_input() {
    if !can_run() {
        return;
    }
    let mut main = shell(
        "stty size; tty; trap 'stty size; echo changed' WINCH; echo ready; while :; do sleep 0.02; done",
    );
    main.terminal = Some(WindowSize {
        rows: 33,
        columns: 120,
    });
    let mut guest = Guest::boot(&Plan {
        command: Some(main),
        ..Plan::default()
    });
    guest.until(|guest| guest.seen[&MAIN].text().contains("ready"));
    guest.host.resize(
        MAIN,
        WindowSize {
            rows: 50,
            columns: 132,
        },
    );
    guest.until(|guest| guest.seen[&MAIN].text().contains("changed"));
    // A typed control-C is the terminal's doing.
    guest.input.insert(MAIN, (vec![3], false));
    let seen = guest.end_of(MAIN);
    let text = seen.text();
    assert!(text.starts_with("33 120\r\n/dev/pts/"), "{text}");
    assert!(text.contains("50 132\r\nchanged"), "{text}");
    assert_eq!(seen.exit, Some(End::Killed(2).into()), "{text}");
    guest.finish();

    let mut cat = command(&["cat"]);
    cat.terminal = Some(WindowSize::default());
    let mut guest = Guest::boot(&Plan {
        command: Some(cat),
        ..Plan::default()
    });
    guest.input.insert(MAIN, (b"typed\n".to_vec(), true));
    let seen = guest.end_of(MAIN);
    assert_eq!(seen.text(), "typed\r\ntyped\r\n", "once as an echo");
    assert_eq!(seen.exit, Some(End::Exited(0).into()));
    guest.finish();
}

#[test]
fn a_command_that_does_not_answer_the_interrupt_key_is_told_of() {
    if !can_run() {
        return;
    }
    let boot = |script| {
        let mut main = shell(script);
        main.terminal = Some(WindowSize::default());
        let mut guest = Guest::boot(&Plan {
            command: Some(main),
            ..Plan::default()
        });
        guest.until(|guest| guest.seen[&MAIN].text().contains("ready"));
        guest
    };
    let press = |guest: &mut Guest, times: usize, answer: &str| {
        guest.input.insert(MAIN, (vec![3], false));
        guest.until(|guest| guest.seen[&MAIN].text().matches(answer).count() == times);
    };
    let mut guest = boot("trap 'echo no' INT; echo ready; while :; do sleep 0.4; done");
    for times in 1..=4 {
        press(&mut guest, times, "no\r\n");
    }
    assert_eq!(guest.interrupted, []);
    guest.host.signal(MAIN, 9);
    guest.end_of(MAIN);
    guest.finish();

    let mut guest = boot("trap '' INT; echo ready; sleep 100");
    let mut times = 0;
    while guest.interrupted.is_empty() {
        times += 1;
        press(&mut guest, times, "^C");
    }
    assert!(times > 1);
    guest.host.signal(MAIN, 9);
    guest.end_of(MAIN);
    guest.finish();
}

#[test]
fn all_output_of_a_terminal_arrives() {
    if !can_run() {
        return;
    }
    let mut guest = Guest::run(command(&["sleep", "1000"]));
    for len in [1, 4095, 100_000, 1_000_000] {
        let mut main = shell(&format!("stty raw; head -c {len} /dev/zero"));
        main.terminal = Some(WindowSize::default());
        // Its input stays open: the end of it is typed, and a terminal echoes that.
        let id = guest.exec(&main);
        let seen = guest.end_of(id);
        assert_eq!(seen.stdout.len(), len);
        assert_eq!(seen.exit, Some(End::Exited(0).into()));
    }
    guest.host.shut_down();
    guest.finish();
}

#[test]
fn a_guest_without_a_command_waits_for_one_and_for_its_end() {
    if !can_run() {
        return;
    }
    let mut guest = Guest::boot(&Plan {
        hostname: Some("drawing-room".into()),
        network: Network::Loopback,
        ..Plan::default()
    });
    let (seen, code) = guest.result(&shell(
        "cat /proc/sys/kernel/hostname; cat /sys/class/net/lo/flags",
    ));
    assert_eq!((seen.text().as_str(), code), ("drawing-room\n0x9\n", 0));
    guest.host.shut_down();
    guest.finish();
}

#[test]
fn an_overlay_takes_what_is_written_to_the_root() {
    if !can_run() {
        return;
    }
    let below = FileSystem {
        kind: "overlay".into(),
        source: "below".into(),
        options: "lowerdir=/base:/empty".into(),
        read_only: true,
    };
    let memory = |path: &str, read_only| Mount {
        path: path.into(),
        file_system: FileSystem {
            kind: "tmpfs".into(),
            source: "memory".into(),
            options: "size=1m".into(),
            read_only,
        },
    };
    let script = "
        cat /etc/file; echo above > /etc/file; cat /etc/file
        echo new > /new && cat /new
        echo x > /data/deep/file && cat /data/deep/file
        echo x > /fixed/file || echo refused
        cat /etc/resolv.conf
        [ -c /dev/null ] && [ -d /proc/self ] && [ -d /sys/class ] && [ -d /dev/shm ] && [ -d /run ] && echo all
        ls /sarang || echo gone";
    let mut guest = Guest::boot(&Plan {
        root: Some(below),
        overlay: true,
        mounts: vec![memory("/data/deep", false), memory("/fixed", true)],
        network: Network::Static {
            interface: "lo".into(),
            address: "10.9.8.7".parse().unwrap(),
            prefix: 24,
            gateway: Some("10.9.8.1".parse().unwrap()),
            dns: vec!["10.9.8.3".parse().unwrap()],
        },
        command: Some(shell(script)),
        ..Plan::default()
    });
    let seen = guest.end_of(MAIN);
    let errors = String::from_utf8_lossy(&seen.stderr).into_owned();
    assert_eq!(
        seen.text(),
        "below\nabove\nnew\nx\nrefused\nnameserver 10.9.8.3\nall\ngone\n",
        "{errors}"
    );
    guest.finish();
}

#[test]
fn what_init_cannot_do_it_says_in_a_sentence_before_it_ends() {
    if !can_run() {
        return;
    }
    let file_system = |kind: &str, source: &str| FileSystem {
        kind: kind.into(),
        source: source.into(),
        ..FileSystem::default()
    };
    let plan = |change: &dyn Fn(&mut Plan)| {
        let mut plan = Plan {
            command: Some(command(&["true"])),
            ..Plan::default()
        };
        change(&mut plan);
        plan
    };
    let cases = [
        (
            plan(&|plan| plan.modules = vec!["/sarang/modules/00-virtio.ko".into()]),
            "the kernel module 00-virtio.ko cannot be loaded: No such file",
        ),
        (
            plan(&|plan| plan.root = Some(file_system("nonsensefs", "x"))),
            "the root of the guest cannot be mounted: the kernel does not know the file system nonsensefs",
        ),
        (
            plan(&|plan| {
                let path = "/dev/null/x".into();
                plan.mounts = vec![Mount {
                    path,
                    file_system: file_system("tmpfs", "x"),
                }];
            }),
            "/dev/null/x cannot be mounted: there is no directory /dev/null/x",
        ),
        (
            plan(&|plan| plan.hostname = Some("x".repeat(65))),
            "cannot be the name of the guest",
        ),
        (
            plan(&|plan| plan.clock = Some(Duration::from_secs(1))),
            "the clock cannot be set: Operation not permitted",
        ),
    ];
    for (plan, words) in cases {
        let mut guest = Guest::boot(&plan);
        while !guest.closed {
            guest.step();
        }
        assert_eq!(guest.errors.len(), 1, "{words}");
        assert!(guest.errors[0].contains(words), "{:?}", guest.errors);
        assert!(guest.seen[&MAIN].pid.is_none());
    }
}
