//! HTTP as a prober speaks it: one request from the calling thread's namespace, and the
//! answer as it came.
//!
//! Not a client for anything else: it follows nothing, keeps nothing and knows no TLS.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// How long a server may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// An answer as it came, but for the framing of its body.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Answer {
    /// The first line, without its end.
    pub status_line: String,
    /// Names and values in the order in which they came, spelt as they were.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The status; 0 if the first line has none.
    pub fn status(&self) -> u16 {
        self.status_line.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_default()
    }

    /// The value of the header of this name, in any spelling.
    pub fn header(&self, name: &str) -> Option<&str> {
        let is_meant = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
        self.headers.iter().find(is_meant).map(|(_, value)| value.as_str())
    }
}

/// Asks for a path, with these headers beside `Host`.
///
/// # Errors
/// Nobody listens, or no HTTP answer comes in time.
pub fn request(
    method: &str,
    to: SocketAddr,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: {to}\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += "\r\n";
    stream.write_all(text.as_bytes())?;
    let answer = read(BufReader::new(stream), method != "HEAD");
    answer.with_context(|| format!("{method} http://{to}{path}"))
}

/// Reads an answer: its body, if there is to be one, by length, in chunks, or to the end.
fn read(mut stream: impl BufRead, has_body: bool) -> Result<Answer> {
    let status_line = line(&mut stream)?;
    ensure!(status_line.starts_with("HTTP/1."), "no HTTP: {status_line:?}");
    let mut headers = Vec::new();
    loop {
        let text = line(&mut stream)?;
        if text.is_empty() {
            break;
        }
        let (name, value) = text.split_once(": ").with_context(|| format!("header {text:?}"))?;
        headers.push((name.to_owned(), value.to_owned()));
    }
    let mut answer = Answer { status_line, headers, body: String::new() };
    if !has_body {
        return Ok(answer);
    }
    let mut body = Vec::new();
    if answer.header("transfer-encoding") == Some("chunked") {
        read_chunks(&mut stream, &mut body)?;
    } else if let Some(length) = answer.header("content-length") {
        let length: usize = length.parse()?;
        body.resize(length, 0);
        stream.read_exact(&mut body)?;
    } else {
        stream.read_to_end(&mut body)?;
    }
    answer.body = String::from_utf8(body)?;
    Ok(answer)
}

fn read_chunks(stream: &mut impl BufRead, body: &mut Vec<u8>) -> Result<()> {
    loop {
        let length = usize::from_str_radix(&line(stream)?, 16)?;
        let start = body.len();
        body.resize(start + length, 0);
        stream.read_exact(&mut body[start..])?;
        ensure!(line(stream)?.is_empty(), "a chunk is longer than it says");
        if length == 0 {
            return Ok(());
        }
    }
}

fn line(stream: &mut impl BufRead) -> Result<String> {
    let mut text = String::new();
    stream.read_line(&mut text)?;
    match text.strip_suffix("\r\n") {
        Some(text) => Ok(text.to_owned()),
        None => bail!("{text:?} is no line of HTTP"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_read_by_its_length_in_chunks_or_to_the_end() -> Result<()> {
        let rows = [
            "Content-Length: 5\r\n\r\nhello, and more",
            "Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
            "Server: x\r\n\r\nhello",
        ];
        for row in rows {
            let answer = read(format!("HTTP/1.1 200 OK\r\n{row}").as_bytes(), true)?;
            assert_eq!((answer.status(), answer.body.as_str()), (200, "hello"), "{row}");
        }
        Ok(())
    }
}
