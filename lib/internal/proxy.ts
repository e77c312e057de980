/**
 * Sends requests through a proxy, if one is set in the environment. curl, Deno and Bun use the
 * variable HTTPS_PROXY, but the `fetch` of Node ignores it by default. In a network that requires a
 * proxy, every request from Node would fail.
 */
import { SyncError } from "./errors.ts";
import { IS_BUN, IS_DENO } from "./suggest.ts";

// Requests to these hosts never use the proxy. The fake Square server runs on the user's computer,
// and a proxy cannot reach that computer under these names.
const LOOPBACK_HOSTS = "localhost,127.0.0.1,[::1]";

/**
 * Creates a `fetch` that uses HTTPS_PROXY, HTTP_PROXY and NO_PROXY. Each name can also be in lower
 * case. If both are set, the one in lower case is used.
 * @throws SyncError (usage) if the value of a proxy is not a URL
 */
export async function createProxyFetch(): Promise<typeof fetch> {
  if (IS_DENO || IS_BUN) return fetch;
  const httpsProxy = readProxy("HTTPS_PROXY");
  const httpProxy = readProxy("HTTP_PROXY");
  if (httpsProxy === "" && httpProxy === "") return fetch;

  // Loaded here, because few users have a proxy. The agent is used with the fetch of the same
  // package. Node's own fetch contains another version of undici, and fails with this agent.
  const { EnvHttpProxyAgent, fetch: undiciFetch } = await import("undici");
  const userHosts = readVariable("NO_PROXY").trim();
  // `*` turns the proxy off for all hosts. undici accepts it only as the whole value.
  const noProxy = userHosts === "*" ? userHosts : `${LOOPBACK_HOSTS},${userHosts}`;
  const dispatcher = new EnvHttpProxyAgent({ httpsProxy, httpProxy, noProxy });
  const proxyFetch: typeof undiciFetch = (input, init) =>
    undiciFetch(input, { ...init, dispatcher });
  // The two types have the same members, but Node and the package declare them separately.
  return proxyFetch as unknown as typeof fetch;
}

/** @returns the URL of the proxy, or an empty string when the variable is not set */
function readProxy(name: string): string {
  const value = readVariable(name).trim();
  if (value === "") return "";
  // A value without http:// is common, for example `proxy.example.com:3128`. curl accepts it too.
  const url = value.includes("://") ? value : `http://${value}`;
  if (URL.canParse(url) && /^https?:$/.test(new URL(url).protocol)) return url;
  // The value is not printed, because it can contain a password.
  throw new SyncError(
    "usage",
    `Cannot use ${name}: expected a URL such as http://proxy.example.com:3128`,
    `correct ${name} in the environment, or unset it if you need no proxy`,
  );
}

/** Reads a variable of the environment, in lower or upper case. */
function readVariable(name: string): string {
  return process.env[name.toLowerCase()] || process.env[name] || "";
}
