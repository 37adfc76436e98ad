//! A program on a pseudo-terminal of its own, with the test at the keyboard.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

pub struct Session {
    pub child: Child,
    keyboard: File,
    terminal: OwnedFd,
    before: Termios,
    /// What was printed and not yet waited for.
    seen: String,
}

impl Session {
    /// Starts a program with these arguments, as a shell would: the terminal is its own, with 30 rows of 100 columns.
    pub fn start(program: &str, arguments: impl FnOnce(&mut Command)) -> Session {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
        let before = tcgetattr(&terminal).unwrap();
        let mut command = Command::new("setsid");
        // What a shell starts in the background has some signals ignored, and so would its children.
        let signals = "--default-signal=HUP,INT,QUIT,TERM";
        command.args(["--ctty", "env", signals, program]);
        arguments(&mut command);
        command
            .stdin(terminal.try_clone().unwrap())
            .stdout(terminal.try_clone().unwrap());
        let mut session = Session {
            child: command.spawn().unwrap(),
            keyboard: File::from(master),
            terminal,
            before,
            seen: String::new(),
        };
        session.resize(30, 100);
        session
    }

    /// Waits until these words are printed, and gives what came before them.
    pub fn expect(&mut self, words: &str) -> String {
        loop {
            if let Some((before, after)) = self.seen.split_once(words) {
                let before = before.to_owned();
                self.seen = after.to_owned();
                return before;
            }
            assert!(self.read(), "`{words}` was never printed: {}", self.seen);
        }
    }

    /// Takes what is printed next; `false` when the program has gone.
    fn read(&mut self) -> bool {
        let mut buffer = [0; 4096];
        // Its own end of the terminal is open in this process, so no end would be seen.
        while self.child.try_wait().unwrap().is_none() {
            let mut fds = [rustix::event::PollFd::new(
                &self.keyboard,
                rustix::event::PollFlags::IN,
            )];
            let while_it_runs = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 50_000_000,
            };
            if rustix::event::poll(&mut fds, Some(&while_it_runs)).unwrap() > 0 {
                let count = self.keyboard.read(&mut buffer).unwrap();
                self.seen
                    .push_str(&String::from_utf8_lossy(&buffer[..count]));
                return true;
            }
        }
        false
    }

    /// Presses keys again and again, each time the terminal has shown `echo`, until the program has gone.
    pub fn press_until_it_ends(&mut self, keys: &[u8], echo: &str) {
        loop {
            self.press(keys);
            while !self.seen.contains(echo) {
                if !self.read() {
                    return;
                }
            }
            self.seen.clear();
        }
    }

    pub fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    pub fn resize(&mut self, rows: u16, columns: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.keyboard, size).unwrap();
    }

    pub fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal)
            .unwrap()
            .local_modes
            .contains(LocalModes::ICANON)
    }

    /// The exit code, after a check that the terminal is as it was.
    pub fn end(mut self) -> Option<i32> {
        let code = self.child.wait().unwrap().code();
        let after = tcgetattr(&self.terminal).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        assert_eq!(after.input_modes, self.before.input_modes);
        assert_eq!(after.output_modes, self.before.output_modes);
        code
    }
}
