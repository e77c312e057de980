/**
 * Makes a proxy that HTTPS_PROXY names work on Node. Node's own `fetch` ignores these variables by default;
 * curl, Deno and Bun honour them.
 */
import { SyncError } from "./errors.ts";
import { IS_BUN, IS_DENO } from "./suggest.ts";

// A proxy cannot reach the user's own computer, on which the fake Square server runs.
const LOOPBACK_HOSTS = "localhost,127.0.0.1,[::1]";

/**
 * Returns a `fetch` that honours HTTPS_PROXY, HTTP_PROXY and NO_PROXY (also in lower case, which wins).
 * @throws SyncError (usage) when one of them is not a URL
 */
export async function createProxyFetch(): Promise<typeof fetch> {
  if (IS_DENO || IS_BUN) return fetch;
  const httpsProxy = readProxy("HTTPS_PROXY");
  const httpProxy = readProxy("HTTP_PROXY");
  if (httpsProxy === "" && httpProxy === "") return fetch;

  // undici is loaded here because only few users have a proxy. Its agent works only with its own fetch:
  // the fetch of Node contains another version of undici and fails with an agent of this one.
  const { EnvHttpProxyAgent, fetch: undiciFetch } = await import("undici");
  const userHosts = readEither("NO_PROXY").trim();
  // undici understands `*` (no proxy for any host) only when it stands alone.
  const noProxy = userHosts === "*" ? userHosts : `${LOOPBACK_HOSTS},${userHosts}`;
  const dispatcher = new EnvHttpProxyAgent({ httpsProxy, httpProxy, noProxy });
  const proxyFetch: typeof undiciFetch = (input, init) =>
    undiciFetch(input, { ...init, dispatcher });
  // The same interface, declared twice: for Node's own copy of undici and for the package.
  return proxyFetch as unknown as typeof fetch;
}

/** @returns the URL of the proxy, or an empty string when the variable is not set */
function readProxy(name: string): string {
  const value = readEither(name).trim();
  if (value === "") return "";
  // `proxy.example.com:3128` without a scheme is common, and curl accepts it.
  const url = value.includes("://") ? value : `http://${value}`;
  if (URL.canParse(url) && /^https?:$/.test(new URL(url).protocol)) return url;
  // The value is not printed, because it can contain a password.
  throw new SyncError(
    "usage",
    `Cannot use ${name}: expected a URL such as http://proxy.example.com:3128`,
    `correct ${name} in the environment, or unset it if you need no proxy`,
  );
}

function readEither(name: string): string {
  return process.env[name.toLowerCase()] || process.env[name] || "";
}
