//! perftest's programs between two containers, and the figures that they print.

use crate::command::{Running, wait_until};
use anyhow::{Context, Result, ensure};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

/// Every pair gets a port of its own: a port in TIME_WAIT would make the next server fail.
static NEXT_PORT: AtomicU16 = AtomicU16::new(18515);

/// One line of a bandwidth test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bandwidth {
    /// Message size.
    pub bytes: u64,
    /// Messages.
    pub iterations: u64,
    /// Average over the run.
    pub gbits: f64,
    /// Million messages a second.
    pub mpps: f64,
}

/// One line of a latency test, microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latency {
    /// Message size.
    pub bytes: u64,
    /// Messages.
    pub iterations: u64,
    /// The commonest value.
    pub typical: f64,
    /// The mean.
    pub average: f64,
    /// 99 of 100 were at most this long.
    pub p99: f64,
    /// 999 of 1000 were at most this long.
    pub p999: f64,
}

/// Where a program of a pair runs.
pub trait Peer {
    /// Starts a program there.
    fn spawn(&self, words: &[&str]) -> Result<Running>;

    /// Whether something there listens to a TCP port.
    fn listens(&self, port: u16) -> bool;

    /// The address by which others reach it.
    fn address(&self) -> &str;
}

/// A server and a client under way.
#[derive(Debug)]
pub struct Pair {
    server: Running,
    client: Running,
}

/// Starts `tool` as a server in `server` and as a client in `client`.
pub fn start(server: &impl Peer, client: &impl Peer, tool: &str, args: &[&str]) -> Result<Pair> {
    start_by(&[], server, client, tool, args)
}

/// Starts `tool` by way of `starter`, a program that runs the program named by its last arguments.
pub fn start_by(starter: &[&str], server: &impl Peer, client: &impl Peer, tool: &str, args: &[&str]) -> Result<Pair> {
    let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
    let port_text = port.to_string();
    let mut words = starter.to_vec();
    words.extend([tool, "-p", &port_text]);
    words.extend(args);
    let mut server_run = server.spawn(&words)?;
    let what = format!("{tool} to listen on port {port}");
    wait_until(&what, Duration::from_secs(60), || server_run.has_ended() || server.listens(port))
        .with_context(|| format!("the server said:\n{}", server_run.output()))?;
    ensure!(!server_run.has_ended(), "{tool} as a server ended at once:\n{}", server_run.output());
    words.push(server.address());
    let client = client.spawn(&words)?;
    Ok(Pair { server: server_run, client })
}

/// Runs `tool` to its end and returns what the client said.
pub fn run(server: &impl Peer, client: &impl Peer, tool: &str, args: &[&str]) -> Result<String> {
    start(server, client, tool, args)?.wait(Duration::from_secs(120))
}

impl Pair {
    /// Waits for both ends; what the client said.
    pub fn wait(self, limit: Duration) -> Result<String> {
        let client = self.client.wait(limit).and_then(crate::command::Ended::success);
        if let Err(error) = client {
            return Err(error.context(format!("the server said:\n{}", self.server.kill())));
        }
        self.server.wait(Duration::from_secs(30))?.success().context("the client ended well, the server did not")?;
        client
    }

    /// What the client has said so far.
    #[must_use]
    pub fn output(&self) -> String {
        self.client.output()
    }

    /// Whether the client has ended.
    pub fn has_ended(&mut self) -> bool {
        self.client.has_ended()
    }

    /// Ends both now; what the client said.
    #[must_use]
    pub fn stop(self) -> String {
        let output = self.client.kill();
        self.server.kill();
        output
    }
}

/// The result lines of a bandwidth test that ran with `--report_gbits`.
#[must_use]
pub fn bandwidths(output: &str) -> Vec<Bandwidth> {
    rows(output, "BW average[Gb/sec]")
        .filter_map(|row| match row[..] {
            [bytes, iterations, _peak, gbits, mpps] => {
                Some(Bandwidth { bytes: bytes as u64, iterations: iterations as u64, gbits, mpps })
            }
            _ => None,
        })
        .collect()
}

/// The result lines of a latency test.
#[must_use]
pub fn latencies(output: &str) -> Vec<Latency> {
    rows(output, "t_typical[usec]")
        .filter_map(|row| match row[..] {
            [bytes, iterations, _min, _max, typical, average, _deviation, p99, p999] => {
                Some(Latency { bytes: bytes as u64, iterations: iterations as u64, typical, average, p99, p999 })
            }
            _ => None,
        })
        .collect()
}

/// The lines of numbers below the heading that contains `column`.
fn rows<'a>(output: &'a str, column: &'a str) -> impl Iterator<Item = Vec<f64>> + 'a {
    output
        .lines()
        .skip_while(move |line| !line.contains(column))
        .skip(1)
        // Standard error is in between: perftest gauges the processor's clock, and doubts it on a busy machine.
        .map(|line| line.split("Correlation coefficient").next().unwrap_or_default())
        .map(|line| line.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>())
        .filter_map(Result::ok)
        .filter(|row| !row.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_lines_are_found_below_their_heading() {
        let output = "\
---------------------------------------------------------------------------------------
 local address: LID 0000 QPN 0x0011 PSN 0x1e6f5
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
Conflicting CPU frequency values detected: 2000.000000 != 2600.000000. CPU Frequency is not max.
 2          5000             0.00               0.048  \t\t   3.010000
 65536      5000             41.20              40.97\t\t   0.078145Correlation coefficient r^2: 0.887794 < 0.9
---------------------------------------------------------------------------------------
";
        let expected = [
            Bandwidth { bytes: 2, iterations: 5000, gbits: 0.048, mpps: 3.01 },
            Bandwidth { bytes: 65536, iterations: 5000, gbits: 40.97, mpps: 0.078_145 },
        ];
        assert_eq!(bandwidths(output), expected);
    }

    #[test]
    fn latency_lines_have_percentiles() {
        let output = "\
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec] 
 64      1000          1.10           95.00        1.20   \t       1.31     \t0.40\t\t2.50 \t\t95.00
";
        let [row] = latencies(output)[..] else { panic!("one line: {output}") };
        assert_eq!((row.bytes, row.iterations, row.typical, row.p99, row.p999), (64, 1000, 1.2, 2.5, 95.0));
    }

    #[test]
    fn other_output_has_no_lines() {
        assert_eq!(bandwidths("Couldn't connect to 10.77.0.1:18515\n"), []);
        assert_eq!(latencies(""), []);
    }
}
