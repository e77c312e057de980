/**
 * Keeps the customers of two Square accounts apart.
 *
 * A customer id is valid in the Square account of one seller only. With the token of another
 * seller, a pull would mix two directories, and a push would create the customers at the wrong
 * seller. So the file stores its account in the table square_account, and every script compares it
 * before it reads or sends anything. Square identifies a seller by a merchant id.
 */
import { createHash } from "node:crypto";
import { isDeepStrictEqual } from "node:util";
import type { Database } from "sql.js";
import type { SquareClient } from "square";
import type { RunContext } from "./context.ts";
import { SyncError } from "./errors.ts";
import { readRows } from "./sql.ts";
import { createSquareError, readErrors } from "./square-errors.ts";

const EXPIRY_WARNING_MS = 7 * 86_400_000;

// The values of an account whose token could not be checked. Without a hash, the next run checks
// the token again.
const UNCHECKED = { tokenHash: null, tokenScopes: null, tokenExpiresAt: null, checkedAt: null };

/** The row of the table square_account. */
export interface StoredAccount {
  environment: string;
  merchantId: string | null;
  /**
   * SHA-256 of the token that was checked last. The token itself is never stored. Unlike a
   * password, a token is long and random, so it cannot be found by hashing guesses.
   */
  tokenHash: string | null;
  /** Separated by spaces, for example `CUSTOMERS_READ CUSTOMERS_WRITE`. */
  tokenScopes: string | null;
  tokenExpiresAt: string | null;
  checkedAt: string | null;
}

/**
 * Reads the account of a file.
 * @param path for the error message
 * @returns undefined if no account is stored yet, as in a new file
 * @throws SyncError (usage) for a file without the table, which cannot keep two accounts apart
 */
export function readAccount(db: Database, path: string): StoredAccount | undefined {
  const tables = readRows(db, "SELECT 1 FROM sqlite_master WHERE name = 'square_account'");
  if (tables.length === 0)
    throw new SyncError(
      "usage",
      `Cannot use "${path}": it has no square_account table`,
      "create the tables of lib/schema.sql in it",
    );
  const [row] = readRows(
    db,
    `SELECT environment, merchant_id, token_hash, token_scopes, token_expires_at, checked_at
     FROM square_account`,
  );
  if (row === undefined) return undefined;
  return {
    environment: readText(row.environment) ?? "",
    merchantId: readText(row.merchant_id),
    tokenHash: readText(row.token_hash),
    tokenScopes: readText(row.token_scopes),
    tokenExpiresAt: readText(row.token_expires_at),
    checkedAt: readText(row.checked_at),
  };
}

/**
 * Writes the account to the file.
 * @throws SyncError (usage) if the file has another environment or merchant, or no table for the
 *   account
 */
export function saveAccount(db: Database, path: string, account: StoredAccount): void {
  const stored = readAccount(db, path);
  requireSameAccount(path, stored, account);
  // Do not write unchanged values: every write counts as a change, and the whole file would be
  // saved.
  if (isDeepStrictEqual(stored, account)) return;
  db.run(
    `INSERT OR REPLACE INTO square_account
       (only_row, environment, merchant_id, token_hash, token_scopes, token_expires_at, checked_at)
     VALUES (1, ?, ?, ?, ?, ?, ?)`,
    [
      account.environment,
      account.merchantId,
      account.tokenHash,
      account.tokenScopes,
      account.tokenExpiresAt,
      account.checkedAt,
    ],
  );
}

/**
 * Compares the account of a file with the account of this run.
 * @param stored the account of the file; undefined if it has none yet, and then any account is
 *   accepted
 * @throws SyncError (usage) if the environment differs, or if both merchants are known and differ
 */
export function requireSameAccount(
  path: string,
  stored: StoredAccount | undefined,
  current: Pick<StoredAccount, "environment" | "merchantId">,
): void {
  if (stored === undefined) return;
  const nextStep =
    "another file with --db or DATABASE_PATH; or the token and settings that belong to this file";
  if (stored.environment !== current.environment)
    throw new SyncError(
      "usage",
      `Cannot use "${path}": it holds customers of ${formatEnvironment(stored.environment)}, and this run is for ${formatEnvironment(current.environment)}`,
      nextStep,
    );
  const { merchantId } = stored;
  if (merchantId !== null && current.merchantId !== null && merchantId !== current.merchantId)
    throw new SyncError(
      "usage",
      `Cannot use "${path}": it holds customers of the Square merchant ${merchantId}, and this token belongs to the merchant ${current.merchantId}`,
      nextStep,
    );
}

/**
 * Checks the token before the other requests of a run: it must belong to the merchant of the file
 * and have the scopes that the script needs. Warns if it expires soon. A token that an earlier run
 * checked is not checked again, so that a run that finds nothing new needs only one request.
 * @param stored the account of the file
 * @param scopes the permissions that the script needs, for example `CUSTOMERS_READ`
 * @param readSomeIds reads ids of customers of the file, at most 100
 * @returns the account to save with the next update of the file
 * @throws SyncError (usage) for another merchant, (denied) for a rejected token or a missing scope
 * @see https://developer.squareup.com/reference/square/o-auth-api/retrieve-token-status
 */
export async function checkAccount(
  square: SquareClient,
  context: RunContext,
  stored: StoredAccount | undefined,
  scopes: readonly string[],
  readSomeIds: () => string[],
): Promise<StoredAccount> {
  const { environment, token } = context.square;
  // The account of the file, if it is the result of an earlier check of this token.
  const checked = stored?.tokenHash === hashToken(token) ? stored : undefined;
  // Trust the stored check only if it passes. If it shows an expired token or a missing scope, ask
  // Square again, because the seller may have extended the token or its scopes since.
  if (
    checked !== undefined &&
    listMissingScopes(checked, scopes).length === 0 &&
    !expiresBefore(checked, context.startedAt)
  ) {
    warnOfExpiry(checked, context);
    return checked;
  }

  const status = await retrieveTokenStatus(square, context);
  const fileMerchantId = stored?.merchantId ?? null;
  if (status !== "no answer") requireScopes(status, scopes);
  // In two cases, it is not proven that the token belongs to the merchant of the file:
  // - Square did not answer.
  // - Square answered without a merchant, and the file has one. The file must keep it. Otherwise
  //   the token of another seller would be accepted next time.
  if (status === "no answer" || (status.merchantId === null && fileMerchantId !== null)) {
    // Keep the result of an earlier check of this token. If the token has expired since, Square
    // rejects the next request, and nothing is mixed up.
    if (checked !== undefined) return checked;
    await requireKnownCustomer(square, context, readSomeIds());
    if (fileMerchantId !== null)
      context.warn(
        `it could not be checked whether this token belongs to the merchant ${fileMerchantId} of this file`,
      );
    return { ...UNCHECKED, environment, merchantId: fileMerchantId };
  }

  const account: StoredAccount = {
    environment,
    ...status,
    tokenHash: hashToken(token),
    checkedAt: new Date(context.startedAt).toISOString(),
  };
  requireSameAccount(context.databasePath, stored, account);
  // The file has no merchant to compare: it is of version 1, or was filled while the token could
  // not be checked. If an earlier run has checked this token, it has made this comparison already.
  if (checked === undefined && fileMerchantId === null)
    await requireKnownCustomer(square, context, readSomeIds());
  if (stored !== undefined && fileMerchantId === null && account.merchantId !== null)
    context.warn(
      `"${context.databasePath}" had no Square merchant recorded: from now on it belongs to the merchant ${account.merchantId}`,
    );
  warnOfExpiry(account, context);
  return account;
}

/**
 * Requires that Square has at least one of the customers for this token. Without a merchant to
 * compare, this is the only proof that file and token belong to the same seller.
 * @param ids the ids of customers of the file; without any, nothing can be mixed up
 * @throws SyncError (usage)
 * @see https://developer.squareup.com/reference/square/customers-api/bulk-retrieve-customers
 */
async function requireKnownCustomer(
  square: SquareClient,
  { databasePath }: RunContext,
  ids: string[],
): Promise<void> {
  if (ids.length === 0) return;
  const { responses = {} } = await square.customers.bulkRetrieveCustomers({ customerIds: ids });
  const isUnknown = (id: string) =>
    readErrors(responses[id]).some(({ code }) => code === "NOT_FOUND");
  if (!ids.every(isUnknown)) return;
  throw new SyncError(
    "usage",
    `Cannot use "${databasePath}": for this token, Square has none of ${ids.length} customers of the file, so it seems to be the token of another seller`,
    "the token of the seller of this file, or another file with --db or DATABASE_PATH; if the oldest and newest 50 customers of the file were all deleted in Square, set deleted_at in their rows",
  );
}

/**
 * True if the file belongs to a seller, and no run has checked this token for it yet. It can be the
 * token of another seller. A file without an account has no customers that could be mixed up.
 */
export function isUncheckedToken(stored: StoredAccount | undefined, token: string): boolean {
  return stored !== undefined && stored.tokenHash !== hashToken(token);
}

type TokenStatus = Pick<StoredAccount, "merchantId" | "tokenScopes" | "tokenExpiresAt">;

/**
 * Calls RetrieveTokenStatus. Square documents it for production tokens only, so a run continues
 * without its result.
 * @returns one of three results:
 *   - Square has answered: the status.
 *   - The endpoint does not exist (404), or rejects sandbox tokens: a status whose fields are null. A
 *     later run would get the same result, so the token counts as checked.
 *   - Any other failure: "no answer". The next run asks again.
 * @throws SyncError (denied) if Square rejects a token outside the sandbox
 */
async function retrieveTokenStatus(
  square: SquareClient,
  context: RunContext,
): Promise<TokenStatus | "no answer"> {
  try {
    const { merchantId, scopes, expiresAt } = await square.oAuth.retrieveTokenStatus({
      maxRetries: 1,
    });
    return {
      merchantId: readText(merchantId),
      tokenScopes: readText(joinScopes(scopes)),
      tokenExpiresAt: readText(expiresAt),
    };
  } catch (error) {
    const described = createSquareError(error, context);
    if (described === undefined) throw error;
    const isDenied = described.kind === "denied";
    // The endpoint may reject a valid sandbox token. An invalid one fails at the next request.
    if (isDenied && context.square.environment !== "sandbox") throw described;
    context.note(`the token could not be checked: ${described.message}`);
    const isMissing = error instanceof Error && "statusCode" in error && error.statusCode === 404;
    if (!isDenied && !isMissing) return "no answer";
    return { merchantId: null, tokenScopes: null, tokenExpiresAt: null };
  }
}

/** Reads a text from a row or a reply. An empty text, or a value of another type, is null. */
function readText(value: unknown): string | null {
  return typeof value === "string" && value !== "" ? value : null;
}

// The SDK does not check the types in a reply, so check here that this is a list of texts.
function joinScopes(scopes: unknown): string | undefined {
  if (!Array.isArray(scopes)) return undefined;
  return scopes.every((scope) => typeof scope === "string") ? scopes.join(" ") : undefined;
}

function requireScopes(
  status: Pick<StoredAccount, "tokenScopes">,
  needed: readonly string[],
): void {
  const missing = listMissingScopes(status, needed);
  if (missing.length === 0) return;
  throw new SyncError(
    "denied",
    `Cannot use this token: it lacks the permission${missing.length > 1 ? "s" : ""} ${missing.join(" and ")}`,
    "ask the seller for it, or use a token that has it",
  );
}

// Square can return no list of scopes for a personal access token. Such a token has all
// permissions, so without a list no scope is missing.
function listMissingScopes(
  { tokenScopes }: Pick<StoredAccount, "tokenScopes">,
  needed: readonly string[],
): string[] {
  if (tokenScopes === null) return [];
  const granted = tokenScopes.split(" ");
  return needed.filter((scope) => !granted.includes(scope));
}

function warnOfExpiry(account: StoredAccount, { startedAt, warn }: RunContext): void {
  if (expiresBefore(account, startedAt + EXPIRY_WARNING_MS))
    warn(
      `the access token expires on ${account.tokenExpiresAt?.slice(0, 10)}: replace SQUARE_ACCESS_TOKEN before that`,
    );
}

function expiresBefore({ tokenExpiresAt }: StoredAccount, ms: number): boolean {
  return tokenExpiresAt !== null && Date.parse(tokenExpiresAt) < ms;
}

function hashToken(token: string): string {
  return createHash("sha256").update(token).digest("hex");
}

function formatEnvironment(name: string): string {
  if (name === "offline") return "the server of SQUARE_BASE_URL (offline)";
  return name === "sandbox" ? "the Square sandbox" : `Square ${name}`;
}
